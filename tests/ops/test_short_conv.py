"""`unit_heads` against its composition from library operations: values, gradients, second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nested_learning.ops import blocks
from nested_learning.ops.short_conv import Heads, unit_heads

CASES = [
    # rows, tokens, taps (0: no convolution), unit, heads, head width
    (2, 11, 4, (True, True, True), 2, 3),
    (1, 1, 4, (True, True, True), 1, 4),
    (3, 7, 2, (True, False, True), 2, 2),
    (2, 5, 0, (True, True, True), 2, 3),
    (2, 6, 3, (False, False, False), 1, 5),
]


def inputs(rows, tokens, taps, unit, heads, width):
    generator = torch.Generator().manual_seed(0)
    channels = len(unit) * heads * width
    columns = tokens + max(taps - 1, 0)
    x = torch.randn(rows, columns, channels, dtype=torch.float64, generator=generator).requires_grad_()
    if not taps:
        return x, None
    return x, torch.randn(channels, 1, taps, dtype=torch.float64, generator=generator).requires_grad_()


def by_library(x, weight, heads):
    """From F.conv1d and the norm's definition."""
    z = x if weight is None else F.conv1d(x.mT, weight, groups=x.shape[-1]).mT
    h = F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1))
    scaled = h / (h.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    wanted = torch.tensor(heads.unit)[:, None, None]
    return torch.where(wanted, scaled, h).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("block", [1, 40, 1_000_000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_library(case, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    heads = Heads(case[3], case[4])
    x, weight = inputs(*case)
    leaves = [x] if weight is None else [x, weight]
    actual, expected = unit_heads(x, weight, heads), by_library(x, weight, heads)
    slope = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    found = [torch.autograd.grad(y, leaves, slope) for y in (actual, expected)]
    for ours, theirs in zip((actual, *found[0]), (expected, *found[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_second_derivatives(case, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    x, weight = inputs(*case)
    leaves = (x,) if weight is None else (x, weight)

    def run(x, weight=None):
        return unit_heads(x, weight, Heads(case[3], case[4]))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_transforms_see_the_composition(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    case = CASES[0]
    x, weight = inputs(*case)
    heads = Heads(case[3], case[4])

    def total(x):
        return unit_heads(x, weight.detach(), heads).square().sum()

    slope = torch.func.grad(total)(x.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(total(x), x)[0], rtol=1e-12, atol=1e-12)
