"""`recomputed`: the numbers and gradients of the function itself."""

from __future__ import annotations

import pytest
import torch

from nested_learning.ops.recompute import recomputed


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_first_and_second_gradients():
    x, state, weight = tensors((3, 4), (3, 4), (4, 4))

    def function(x, states, factor):
        first, second = states
        assert first is second  # one tensor given twice stays one
        y = torch.tanh(x @ weight) * factor + first * second.sin()
        return y, {"state": (y * x, None), "note": factor, "count": torch.arange(3)}

    def flat(x, state, weight):
        y, rest = recomputed(function, (x, (state, state), 2.0), [weight])
        assert rest["note"] == 2.0
        assert rest["state"][1] is None
        assert not rest["count"].requires_grad
        return y, rest["state"][0]

    def direct(x, state, weight):
        y, rest = function(x, (state, state), 2.0)
        return y, rest["state"][0]

    for a, b in zip(flat(x, state, weight), direct(x, state, weight), strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(flat, (x, state, weight))
    assert torch.autograd.gradgradcheck(flat, (x, state, weight))


def test_an_output_that_is_not_used_and_an_input_that_asks_for_nothing():
    x, y = tensors((4,), (4,))
    fixed = torch.ones(4, dtype=torch.float64)
    product, _ = recomputed(lambda a, b, c: (a * b * c, b.exp()), (x, y, fixed), [])
    product.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(y.grad, x.detach())


def test_the_second_pass_runs_under_the_first_ones_autocast():
    x, weight = (t.detach().float().requires_grad_() for t in tensors((2, 4), (4, 4)))
    seen = []

    def function(x):
        y = x @ weight
        seen.append(y.dtype)
        return y

    with torch.autocast("cpu", torch.bfloat16):
        y = recomputed(function, (x,), [weight])
    y.float().sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("used", [0, 1])
def test_no_graph_is_kept(used):
    """One node, whatever the function does."""
    x = tensors((4,))[0]
    outputs = recomputed(lambda x: (x.sin().cos().exp(), x.tan()), (x,), [])
    node = outputs[used].grad_fn
    assert next(parent for parent, _ in node.next_functions if parent is not None).variable is x
