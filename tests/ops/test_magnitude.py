"""Units in which squares stay in range, and the functions that use them."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from nested_learning.ops import newton_schulz
from nested_learning.ops.norm import magnitude

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_below_the_largest_number(dtype):
    info = torch.finfo(dtype)
    largest = torch.tensor([info.tiny, 3 * info.tiny, 1.0, 1.5, 2.0, 100.0, info.max], dtype=dtype)
    x = torch.stack([largest, -largest / 2, largest * 0], dim=1)
    s = magnitude(x, 1)
    assert s.shape == (7, 1)
    assert (torch.frexp(s).mantissa == 0.5).all()
    assert (s.squeeze(1) <= largest).all()
    assert (largest / s.squeeze(1) < 2).all()
    assert torch.equal((x / s) * s, x)


def test_zeros_and_what_is_smaller_than_any_normal_number():
    info = torch.finfo(torch.float32)
    assert magnitude(torch.zeros(3)).item() == 1
    assert magnitude(torch.tensor([info.tiny * info.eps])).item() == info.tiny


def test_it_is_a_constant_for_autograd_and_vectorises():
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) * 1e-25
    slopes = vmap(grad(lambda row: (magnitude(row) * (row / magnitude(row)).norm()).squeeze()))(x)
    torch.testing.assert_close(slopes.double(), x.double() / x.double().norm(dim=1, keepdim=True))


@pytest.mark.parametrize("function", [newton_schulz.quintic, newton_schulz.cubic])
@pytest.mark.parametrize("shape", [(96, 128), (3, 20, 8)])
@pytest.mark.parametrize("exponent", [-100, -83, 60, 100])
def test_newton_schulz_does_not_depend_on_the_units(function, shape, exponent):
    """Bit by bit: ‖G‖² of 96·128 numbers of 1e18 is not in float32. `eps` is the one unit that there is."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = function(G, eps=2.0**-40)
    assert torch.equal(function(2.0**exponent * G, eps=2.0 ** min(exponent - 40, 0)), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_newton_schulz_of_less_than_epsilon_is_divided_by_it(dtype):
    G = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype) * 1e-3
    scaled = newton_schulz.quintic(G, eps=1.0, steps=0)
    assert torch.equal(scaled, G)
    assert newton_schulz.quintic(torch.zeros(3, 4, dtype=dtype)).abs().max() == 0
