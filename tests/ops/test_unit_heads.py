"""`unit_heads` against its composition from library operations: values, gradients, second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nested_learning.ops import heads as ops
from nested_learning.ops.heads import Heads, unit_heads

CASES = [
    # rows, tokens, taps (0: no convolution), unit, heads, head width
    (2, 11, 4, (True, True, True), 2, 3),
    (1, 1, 4, (True, True, True), 1, 4),
    (3, 7, 2, (True, False, True), 2, 2),
    (2, 5, 0, (True, True, True), 2, 3),
    (2, 6, 3, (False, False, False), 1, 5),
    (2, 2, 4, (True, True, True), 1, 2),  # shorter than its history
    (5, 2, 4, (True, False, True), 1, 4),  # blocks of several rows
]


def inputs(rows, tokens, taps, unit, heads, width):
    """x, history and weight, None without a convolution."""
    generator = torch.Generator().manual_seed(0)
    channels = len(unit) * heads * width

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x = normal(rows, tokens, channels)
    return (x, normal(rows, taps - 1, channels), normal(channels, 1, taps)) if taps else (x, None, None)


def by_library(x, history, weight, heads):
    """From F.conv1d and the norm's definition."""
    z = x
    if weight is not None:
        before = (
            torch.zeros_like(x[:, :1]).expand(-1, weight.shape[-1] - 1, -1) if history is None else history
        )
        z = F.conv1d(torch.cat([before, x], dim=1).mT, weight, groups=x.shape[-1]).mT
    h = F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1))
    scaled = h / (h.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    wanted = torch.tensor(heads.unit)[:, None, None]
    return torch.where(wanted, scaled, h).permute(2, 0, 3, 1, 4).unbind()


@pytest.mark.parametrize("block", [1, 40, 100, 1_000_000])
@pytest.mark.parametrize("from_zeros", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_library(case, from_zeros, block, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", block)
    heads = Heads(case[3], case[4])
    x, history, weight = inputs(*case)
    history = None if from_zeros else history
    leaves = [t for t in (x, history, weight) if t is not None]
    ours, theirs = unit_heads(x, history, weight, heads), by_library(x, history, weight, heads)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in theirs]
    ours += torch.autograd.grad(ours, leaves, slopes)
    theirs += torch.autograd.grad(theirs, leaves, slopes)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [*CASES[1:4], CASES[5]], ids=str)
def test_second_derivatives(case, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 1)
    x, history, weight = inputs(*case)
    leaves = (x,) if weight is None else (x, history, weight)

    def run(x, history=None, weight=None):
        return unit_heads(x, history, weight, Heads(case[3], case[4]))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)  # along random directions
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_transforms_see_the_composition(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 1)
    case = CASES[0]
    x, history, weight = inputs(*case)
    heads = Heads(case[3], case[4])

    def total(x):
        return sum(y.square().sum() for y in unit_heads(x, history.detach(), weight.detach(), heads))

    slope = torch.func.grad(total)(x.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(total(x), x)[0], rtol=1e-12, atol=1e-12)
