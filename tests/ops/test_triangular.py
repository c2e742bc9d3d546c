from __future__ import annotations

import pytest
import torch

from nested_learning.ops.delta_rule.triangular import inverse_unit_lower, solve_unit_lower


def lower(C: int, scale: float = 0.4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(C)
    return scale * torch.randn(3, C, C, generator=g, dtype=dtype).tril(-1)


@pytest.mark.parametrize("C", [1, 2, 3, 15, 16, 17, 32, 33, 64, 100])
def test_inverse_equals_the_library_solver(C):
    L = lower(C, 0.2)
    expected = torch.linalg.inv(torch.eye(C, dtype=L.dtype) + L)
    torch.testing.assert_close(inverse_unit_lower(L), expected, rtol=1e-11, atol=1e-11)


def test_first_and_second_derivatives_broadcast():
    L, R = lower(5).requires_grad_(), torch.randn(2, 1, 5, 2, dtype=torch.float64).requires_grad_()
    solve = lambda L, R: solve_unit_lower(L.tril(-1), R)  # noqa: E731
    assert torch.autograd.gradcheck(solve, (L, R))
    assert torch.autograd.gradgradcheck(solve, (L, R))


def test_float32_error_stays_small_where_the_series_grows():
    """L full of 0.5: powers of L reach 10¹⁵ at C = 64, the inverse stays below 1."""
    L = torch.full((1, 64, 64), 0.5).tril(-1)
    exact = torch.linalg.inv((torch.eye(64) + L).double())
    assert exact.abs().max() <= 1
    assert (inverse_unit_lower(L) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("C", [3, 7, 16, 24, 64])
@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("keys", ["two", "nearly one"])
def test_float32_is_as_good_as_substitution_for_keys_that_come_again(C, rate, keys):
    """The delta rule's L = rate · ⟨k_t, k_s⟩ at rates whose I − rate k kᵀ has an eigenvalue of −1."""
    g = torch.Generator().manual_seed(C)
    k = torch.randn(8, C, 16, generator=g, dtype=torch.float64)
    if keys == "two":
        k = k[:, torch.randint(0, 2, (C,), generator=g)]
    else:
        k = k[:, :1] + 0.1 * k
    k = k / k.norm(dim=-1, keepdim=True)
    L = (rate * (k @ k.mT)).tril(-1)
    eye = torch.eye(C, dtype=L.dtype).expand_as(L)
    exact = torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    assert exact.abs().max() <= rate + 1e-9
    substituted = torch.linalg.solve_triangular(L.float(), eye.float(), upper=False, unitriangular=True)
    error, least = ((X - exact).abs().max() for X in (inverse_unit_lower(L.float()), substituted))
    assert error < 10 * least + 1e-6
