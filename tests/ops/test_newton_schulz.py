"""Newton-Schulz against the singular value decomposition and the scalar maps it must equal."""

from __future__ import annotations

import pytest
import torch

from nested_learning.ops import newton_schulz
from nested_learning.ops.newton_schulz import MUON_COEFFICIENTS


def matrix(singular_values: torch.Tensor, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    r = len(singular_values)
    U = torch.linalg.qr(torch.randn(rows, r, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(cols, r, generator=g, dtype=torch.float64))[0]
    return U @ torch.diag(singular_values) @ V.T


def aligned_values(G: torch.Tensor, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values of `G` and uᵢᵀ result vᵢ, after checking that `result` is diagonal in G's basis."""
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.T @ result @ Vh.T
    torch.testing.assert_close(core, torch.diag(core.diagonal()), rtol=0, atol=1e-9)
    return s, core.diagonal()


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_quintic_is_the_scalar_polynomial_on_each_singular_value(shape, steps):
    G = matrix(torch.tensor([3.0, 2.0, 0.7, 0.1, 0.01], dtype=torch.float64), *shape)
    s, got = aligned_values(G, newton_schulz.quintic(G, steps))
    a, b, c = MUON_COEFFICIENTS
    expected = s / s.norm()
    for _ in range(steps):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_quintic_band_of_five_steps():
    """Every relative singular value from 0.01 to 1 ends in [0.65, 1.25]."""
    x = torch.logspace(-2, 0, 2000, dtype=torch.float64)
    G = torch.zeros(2000, 1, 2, dtype=torch.float64)
    assert newton_schulz.quintic(G).abs().max() == 0
    diagonal = torch.zeros(2000, 2, 2, dtype=torch.float64)
    diagonal[:, 0, 0], diagonal[:, 1, 1] = x, (1 - x**2).sqrt()
    values = torch.linalg.svdvals(newton_schulz.quintic(diagonal))
    values = values[(1 - x**2).sqrt() >= 0.01]
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_low_precision_stays_near_the_float64_result(dtype, shape):
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = newton_schulz.quintic(G, dtype=dtype)
    assert got.dtype == dtype
    values = torch.linalg.svdvals(got.double())
    assert values.min() > 0.6
    assert values.max() < 1.3
    error = (got.double() - newton_schulz.quintic(G)).norm() / got.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("function", [newton_schulz.quintic, newton_schulz.cubic])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_batches_equal_single_matrices_and_scale_does_not_matter(function, shape):
    G = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batched = function(G)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], function(G[i, j]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function(1e-3 * G), batched, rtol=1e-10, atol=1e-10)


def test_cubic_ends_at_the_roots_of_eq_44():
    G = matrix(torch.tensor([1.0, 0.5, 0.1, 1e-3], dtype=torch.float64), 4, 6)
    s, sigma = aligned_values(G, newton_schulz.cubic(G, steps=400))
    torch.testing.assert_close(2 * sigma**3 - sigma, s / s.norm(), rtol=0, atol=1e-9)
    assert sigma.min() > 0.707
    assert sigma.max() < 1.0


def test_cubic_step_is_the_gradient_of_its_objective():
    G = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = G / G.norm()
    O = target.clone().requires_grad_()  # noqa: E741
    objective = 0.5 * (O - target).square().sum() + 0.5 * (O @ O.T - torch.eye(4)).square().sum()
    (gradient,) = torch.autograd.grad(objective, O)
    torch.testing.assert_close(
        newton_schulz.cubic(G, 1, 0.1), target - 0.1 * gradient, rtol=1e-12, atol=1e-14
    )


def test_a_rank_one_matrix_is_orthogonal_already():
    G = matrix(torch.tensor([5.0], dtype=torch.float64), 4, 3)
    torch.testing.assert_close(newton_schulz.cubic(G), G / 5, rtol=1e-12, atol=1e-12)


def test_gradients():
    G = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda G: newton_schulz.quintic(G, 2), G)
    assert torch.autograd.gradcheck(lambda G: newton_schulz.cubic(G, 2), G)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        newton_schulz.quintic(torch.ones(3))
    with pytest.raises(ValueError, match="complex64"):
        newton_schulz.cubic(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="got -1"):
        newton_schulz.quintic(torch.ones(2, 2), steps=-1)
    with pytest.raises(ValueError, match=r"\(0, 0.2\]"):
        newton_schulz.cubic(torch.ones(2, 2), step_size=0.5)
