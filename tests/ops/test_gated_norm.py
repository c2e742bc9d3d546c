"""`gated_norm` against its definition: values, gradients, second derivatives, half-precision gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nested_learning.ops import heads as ops
from nested_learning.ops.heads import gated_norm

EPS = 1e-6


def inputs(dtype=torch.float64, rows=2, tokens=7):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(rows, 3, tokens, 4, dtype=dtype, generator=generator).transpose(1, 2).requires_grad_()
    gate = torch.randn(rows, tokens, 12, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(4, dtype=dtype, generator=generator).requires_grad_()
    return y, gate, weight


def definition(y, gate, weight):
    scaled = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return scaled.flatten(2) * gate * torch.sigmoid(gate)


@pytest.mark.parametrize(("rows", "tokens"), [(2, 7), (5, 2)])
@pytest.mark.parametrize("block", [1, 40, 60, 1_000_000])
def test_equals_the_definition(block, rows, tokens, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", block)
    leaves = inputs(rows=rows, tokens=tokens)
    actual, expected = gated_norm(*leaves, EPS), definition(*leaves)
    slope = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    found = [torch.autograd.grad(out, leaves, slope) for out in (actual, expected)]
    for ours, theirs in zip((actual, *found[0]), (expected, *found[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivatives(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 1)
    leaves = inputs()
    assert torch.autograd.gradcheck(lambda *t: gated_norm(*t, EPS), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: gated_norm(*t, EPS), leaves)


def test_half_precision_gate():
    """Under autocast the gate is in half precision, the memories' output is not."""
    y, gate, weight = inputs(torch.float32)
    out = gated_norm(y, gate.bfloat16(), weight, EPS)
    assert out.dtype == torch.bfloat16
    expected = F.rms_norm(y, (4,), weight, EPS).flatten(2).bfloat16() * F.silu(gate.bfloat16())
    torch.testing.assert_close(out, expected)
