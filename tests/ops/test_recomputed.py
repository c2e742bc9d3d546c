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


def chain(length, weight, call):
    """State after `length` calls that share a parameter, each on the state before."""
    state = weight[0] * 0.5
    for _ in range(length):
        state = call(lambda state: torch.tanh(weight @ state) + state.sin(), state)
    return state


def test_gradients_of_a_chain_as_a_graph():
    """Each call's gradient to the parameter is its own, though the parameter is in its input's history."""
    (weight,) = tensors((4, 4))

    def flat(weight):
        return chain(4, weight, lambda f, state: recomputed(f, (state,), [weight]))

    def gradient(function):
        return torch.autograd.grad(function(weight).square().sum(), weight, create_graph=True)[0]

    first = gradient(lambda weight: chain(4, weight, lambda f, state: f(state)))
    torch.testing.assert_close(gradient(flat), first, rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(flat, (weight,))


def test_second_gradients_cost_as_much_per_call_however_many_calls():
    (weight,) = tensors((4, 4))

    def calls(length):
        count = 0

        def counted(function, state):
            def inner(state):
                nonlocal count
                count += 1
                return function(state)

            return recomputed(inner, (state,), [weight])

        y = chain(length, weight, counted).square().sum()
        torch.autograd.grad(y, weight, create_graph=True)[0].square().sum().backward()
        return count

    assert calls(8) == 2 * calls(4)
