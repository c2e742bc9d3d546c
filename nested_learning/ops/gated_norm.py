"""What stands between the memories and a memory layer's output: RMS norm per head and gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.blocks import blocks, composes


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(y) per head, times silu(gate).

    On a CPU the passes over more than one block of numbers go block by block through the tokens, so that each
    block is in a cache; the backward pass recomputes what it needs.

    Args:
        y: [B, T, H, d] float32 or float64.
        gate: [B, T, H·d] logits, any floating dtype.
        weight: [d] scales of the norm, in y's dtype.
        eps: of the norm.

    Returns: [B, T, H·d] in the gate's dtype.
    """
    if composes(y) or gate.dtype != y.dtype:
        return _composed(y, gate, weight, eps)
    return _GatedNorm.apply(y, gate, weight, eps)


def _composed(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    y = F.rms_norm(y, weight.shape, weight, eps)
    return y.flatten(2).to(gate.dtype) * F.silu(gate)


class _GatedNorm(torch.autograd.Function):
    """`_composed` in blocks; where the backward pass is itself to be differentiated, `_composed` itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, gate, weight)
        ctx.eps = eps
        out = torch.empty_like(gate)
        for row, columns in blocks(gate, gate.shape[1]):
            n, _ = _normalised(y[row, columns], eps)
            torch.mul(n.mul_(weight).flatten(1), F.silu(gate[row, columns]), out=out[row, columns])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = y.view_as(y), gate.view_as(gate), weight.view_as(weight)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(_composed(*inputs, ctx.eps), wanted, g, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), None
        g_y, g_gate, g_weight = torch.empty_like(y), torch.empty_like(gate), torch.zeros_like(weight)
        for row, columns in blocks(gate, gate.shape[1]):
            n, r = _normalised(y[row, columns], ctx.eps)
            z, g_out = gate[row, columns], g[row, columns]
            g_n = (g_out * F.silu(z)).unflatten(1, n.shape[1:])
            scaled = (n * weight).flatten(1).mul_(g_out)
            g_gate[row, columns] = torch.ops.aten.silu_backward(scaled, z)
            g_weight += (g_n * n).sum((0, 1))
            g_n.mul_(weight)
            along = (g_n * n).mean(-1, keepdim=True)
            g_y[row, columns] = g_n.addcmul_(n, along, value=-1).mul_(r)
        return g_y, g_gate, g_weight, None


def _normalised(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y / RMS(y), a new contiguous tensor, and the factor."""
    y = y.clone(memory_format=torch.contiguous_format)
    r = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y.mul_(r), r
