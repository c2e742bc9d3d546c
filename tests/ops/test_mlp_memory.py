"""The hand-written inner gradient and row scalings against autograd."""

from __future__ import annotations

import pytest
import torch

from nested_learning.memory import ResidualMLP
from nested_learning.ops import mlp_memory
from nested_learning.ops.norm import clip_norm, unit


@pytest.fixture
def memory():
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d, e = 4, 6
    return normal(2, 7, d), normal(2, 7, d), 0.3 * normal(2, d, e), normal(2, e, d)  # k, v, W1, W2


def test_read_is_the_equation(memory):
    k, _, W1, W2 = memory
    h = torch.nn.functional.silu(k @ W2.mT)
    expected = k + (h / (h.square().sum(-1, keepdim=True) + 0.1**2).sqrt()) @ W1.mT
    weights = {"W1": W1, "W2": W2}
    memory = ResidualMLP()
    torch.testing.assert_close(memory.read(k, lambda name, x: x @ weights[name].mT), expected)
    torch.testing.assert_close(k + memory.evaluate(k, weights).answer, expected)


def test_hidden_gradient_equals_autograd(memory):
    k, v, W1, W2 = memory
    z = (k @ W2.mT).requires_grad_()
    hidden = mlp_memory.hidden(z)
    error = k + hidden.unit @ W1.mT - v
    (expected,) = torch.autograd.grad(0.5 * error.square().sum(), z)
    torch.testing.assert_close(mlp_memory.hidden_gradient(hidden, error, W1), expected)


def test_hidden_gradient_has_first_and_second_derivatives(memory):
    k, v, W1, W2 = (t[0, :2] if t.shape[1] == 7 else t[0] for t in memory)

    def inner_gradient(k, v, W1, W2):
        hidden = mlp_memory.hidden(k @ W2.mT)
        return mlp_memory.hidden_gradient(hidden, k + hidden.unit @ W1.mT - v, W1)

    arguments = tuple(t.clone().requires_grad_() for t in (k, v, W1, W2))
    assert torch.autograd.gradcheck(inner_gradient, arguments)
    assert torch.autograd.gradgradcheck(inner_gradient, arguments)


@pytest.mark.parametrize("fn", [unit, clip_norm, lambda x: clip_norm(x, 0.5)])
def test_row_scalings_differentiate_twice(fn):
    rows = torch.tensor([[0.1, 0.2, -0.1], [2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(fn, rows.requires_grad_())
    assert torch.autograd.gradgradcheck(fn, rows)


def test_clip_norm_leaves_small_rows_alone_and_bounds_large_ones():
    x = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(clip_norm(x), torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(clip_norm(x, 2.0)[1], torch.tensor([1.2, 1.6]))


def test_zero_rows_have_finite_gradients():
    for fn in (unit, clip_norm, lambda z: mlp_memory.hidden(z).unit):
        x = torch.zeros(2, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(fn(x).sum(), x)
        assert gradient.isfinite().all()


def test_vmap_and_functional_gradients_work():
    """torch.func users take gradients through the memory as through any function."""
    x = torch.randn(3, 4, dtype=torch.float64)
    batched = torch.func.vmap(torch.func.grad(lambda row: unit(row)[0]))(x)
    single = torch.stack([torch.func.grad(lambda row: unit(row)[0])(row) for row in x])
    torch.testing.assert_close(batched, single)
