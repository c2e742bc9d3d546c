"""From a memory layer's projections to its memories: convolution, SiLU, unit norm per head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.blocks import blocks, composes
from nested_learning.ops.conv import causal_conv
from nested_learning.ops.norm import UNIT_FLOOR, unit


class Heads(NamedTuple):
    """How the channels are divided.

    Attributes:
        unit: per path, whether its vectors are L2-normalised.
        per_path: heads of each path.
    """

    unit: tuple[bool, ...]
    per_path: int


def unit_heads(x: Tensor, weight: Tensor | None, heads: Heads) -> Tensor:
    """n(silu(conv(x))) per path and head, n the L2 normalisation with a floor (`ops.norm.unit`).

    On a CPU the passes over more than one block of numbers go block by block through the tokens, so that each
    block is in a cache; the backward pass recomputes what it needs from x.

    Args:
        x: [B, K−1+T, P·H·d] float32 or float64, P paths of H heads; the first K−1 columns are the inputs
            before the sequence.
        weight: [P·H·d, 1, K] of a causal depthwise convolution, None for none (K = 1).

    Returns: [P, B, H, T, d].
    """
    if composes(x):
        return _composed(x, weight, heads)
    return _UnitHeads.apply(x, weight, heads)


def _composed(x: Tensor, weight: Tensor | None, heads: Heads) -> Tensor:
    """The definition."""
    z = x if weight is None else causal_conv(x, weight)
    h = F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1))  # [B, T, P, H, d]
    if all(heads.unit):
        return unit(h).permute(2, 0, 3, 1, 4)
    parts = [unit(part) if wanted else part for part, wanted in zip(h.unbind(2), heads.unit, strict=True)]
    return torch.stack(parts).transpose(2, 3)


class _UnitHeads(torch.autograd.Function):
    """`_composed` in blocks; where the backward pass is itself to be differentiated, `_composed` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, heads: Heads) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.heads = heads
        taps = _taps(x, weight)
        out = _empty_output(x, taps, heads)
        for row, columns in blocks(x, out.shape[3]):
            z = _convolve(x[row], taps, columns)
            h, f = _normalised(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            out[:, row, :, columns] = h.mul_(f).permute(1, 2, 0, 3)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_composed_backward(x, weight, ctx.heads, g), None
        heads, taps = ctx.heads, _taps(x, weight)
        g_x, g_taps = torch.zeros_like(x), torch.zeros_like(taps)
        for row, columns in blocks(x, g.shape[3]):
            z = _convolve(x[row], taps, columns)
            y, f = _normalised(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            y.mul_(f)
            g_h = g[:, row, :, columns].permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)
            along = (y * g_h).sum(-1, keepdim=True)
            if not all(heads.unit):
                along = along * _wanted(heads, f)
            g_z = g_h.addcmul_(y, along, value=-1).mul_(f).flatten(1)
            torch.ops.aten.silu_backward.grad_input(g_z, z, grad_input=g_z)
            for j, tap in enumerate(taps):
                window = slice(columns.start + j, columns.stop + j)
                g_x[row, window].addcmul_(g_z, tap)
                g_taps[j] += (g_z * x[row, window]).sum(0)
        return g_x, None if weight is None else g_taps.T.unsqueeze(1), None


def _composed_backward(
    x: Tensor, weight: Tensor | None, heads: Heads, g: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to x and weight, as a graph that can be differentiated again."""
    inputs = [None if t is None else t.view_as(t) for t in (x, weight)]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(_composed(inputs[0], inputs[1], heads), wanted, g, create_graph=True))  # type: ignore[arg-type]
    g_x, g_weight = (next(found) if t is not None and t.requires_grad else None for t in inputs)
    return g_x, g_weight


def _taps(x: Tensor, weight: Tensor | None) -> Tensor:
    """[K, channels]."""
    return x.new_ones(1, x.shape[-1]) if weight is None else weight.squeeze(1).T.contiguous()


def _empty_output(x: Tensor, taps: Tensor, heads: Heads) -> Tensor:
    tokens, paths = x.shape[1] - len(taps) + 1, len(heads.unit)
    return x.new_empty(paths, len(x), heads.per_path, tokens, x.shape[-1] // (paths * heads.per_path))


def _convolve(x: Tensor, taps: Tensor, columns: slice) -> Tensor:
    """Columns of the convolution of one row x [K−1+T, channels]."""
    out = x[columns] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        out.addcmul_(x[columns.start + j : columns.stop + j], tap)
    return out


def _normalised(h: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """h [columns, P, H, d] and the factors [columns, P, H, 1] that make it unit-norm; 1 where not wanted."""
    f = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().add_(UNIT_FLOOR**2).rsqrt_()
    return h, f if all(heads.unit) else torch.where(_wanted(heads, f).bool(), f, 1.0)


def _wanted(heads: Heads, like: Tensor) -> Tensor:
    return torch.tensor(heads.unit, dtype=like.dtype, device=like.device).view(-1, 1, 1)
