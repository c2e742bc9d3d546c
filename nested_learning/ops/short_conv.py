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


def unit_heads(x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads) -> tuple[Tensor, ...]:
    """n(silu(conv(x))) per path and head, n the L2 normalisation with a floor (`ops.norm.unit`).

    On a CPU the passes over more than one block of numbers go block by block through the tokens, so that each
    block is in a cache; the backward pass recomputes what it needs from x.

    Args:
        x: [B, T, P·H·d] float32 or float64, P paths of H heads.
        history: [B, K−1, P·H·d] the inputs before the sequence; None for zeros, or where K = 1.
        weight: [P·H·d, 1, K] of a causal depthwise convolution, None for none (K = 1).

    Returns: of each path [B, H, T, d].
    """
    if composes(x):
        return _composed(x, history, weight, heads)
    return _UnitHeads.apply(x, history, weight, heads)


def _composed(x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads) -> tuple[Tensor, ...]:
    """The definition."""
    z = x
    if weight is not None:
        before = weight.shape[-1] - 1
        z = F.pad(x, (0, 0, before, 0)) if history is None else torch.cat([history, x], dim=1)
        z = causal_conv(z, weight)
    h = F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1))  # [B, T, P, H, d]
    parts = [unit(part) if wanted else part for part, wanted in zip(h.unbind(2), heads.unit, strict=True)]
    return tuple(part.transpose(1, 2) for part in parts)


class _UnitHeads(torch.autograd.Function):
    """`_composed` in blocks; where the backward pass is itself to be differentiated, `_composed` itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, history, weight)
        ctx.heads = heads
        taps = _taps(x, weight)
        B, T, channels = x.shape
        shape = (B, heads.per_path, T, channels // (len(heads.unit) * heads.per_path))
        outputs = tuple(x.new_empty(shape) for _ in heads.unit)
        for row, columns in blocks(x, T):
            z = _convolve(_window(x, history, len(taps) - 1, row, columns), taps)
            h, f = _normalised(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            for out, part in zip(outputs, h.mul_(f).unbind(1), strict=True):
                out[row, :, columns] = part.transpose(0, 1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, history, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_composed_backward(x, history, weight, ctx.heads, grads), None
        heads, taps = ctx.heads, _taps(x, weight)
        before = len(taps) - 1
        g_x, g_taps = torch.empty_like(x), torch.zeros_like(taps)
        g_history = None if history is None else torch.zeros_like(history)
        for row, columns in blocks(x, x.shape[1]):
            window = _window(x, history, before, row, columns)
            z = _convolve(window, taps)
            y, f = _normalised(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            y.mul_(f)
            g_z = torch.stack([g[row, :, columns].transpose(0, 1) for g in grads], dim=1)
            along = (y * g_z).sum(-1, keepdim=True)
            if not all(heads.unit):
                along = along * _wanted(heads, f)
            g_z = g_z.addcmul_(y, along, value=-1).mul_(f).flatten(1)
            torch.ops.aten.silu_backward.grad_input(g_z, z, grad_input=g_z)
            product = y.view_as(g_z)  # no longer needed
            for j in range(len(taps)):
                torch.mul(g_z, window[j : j + len(g_z)], out=product)
                g_taps[j] += product.sum(0)
            # The last tap is the token's own and comes first, so that every column is set before it is
            # added to.
            torch.mul(g_z, taps[-1], out=g_x[row, columns])
            for j, tap in enumerate(taps[:-1]):
                start = columns.start - before + j
                outside = max(0, -start)  # columns that lie in the history
                g_x[row, start + outside : max(0, start + len(g_z))].addcmul_(g_z[outside:], tap)
                if g_history is not None and outside:
                    count, first = min(outside, len(g_z)), columns.start + j
                    g_history[row, first : first + count].addcmul_(g_z[:count], tap)
        return g_x, g_history, None if weight is None else g_taps.T.unsqueeze(1), None


def _composed_backward(
    x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads, grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradients to x, history and weight, as a graph that can be differentiated again."""
    x = x.view_as(x)
    inputs = [x, *(None if t is None else t.view_as(t) for t in (history, weight))]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    outputs = _composed(x, inputs[1], inputs[2], heads)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _taps(x: Tensor, weight: Tensor | None) -> Tensor:
    """[K, channels]."""
    return x.new_ones(1, x.shape[-1]) if weight is None else weight.squeeze(1).T.contiguous()


def _window(x: Tensor, history: Tensor | None, before: int, row: int, columns: slice) -> Tensor:
    """The columns of one row, with as many as `before` in front [before + columns, channels]."""
    start = columns.start - before
    if start >= 0:
        return x[row, start : columns.stop]
    front = x.new_zeros(before, x.shape[-1]) if history is None else history[row]
    return torch.cat([front, x[row, : columns.stop]])[columns.start :]


def _convolve(window: Tensor, taps: Tensor) -> Tensor:
    """The convolution of one row [K−1+T, channels] -> [T, channels]."""
    columns = len(window) - len(taps) + 1
    out = window[:columns] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        out.addcmul_(window[j : j + columns], tap)
    return out


def _normalised(h: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """h [columns, P, H, d] and the factors [columns, P, H, 1] that make it unit-norm; 1 where not wanted."""
    f = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().add_(UNIT_FLOOR**2).rsqrt_()
    return h, f if all(heads.unit) else torch.where(_wanted(heads, f).bool(), f, 1.0)


def _wanted(heads: Heads, like: Tensor) -> Tensor:
    return torch.tensor(heads.unit, dtype=like.dtype, device=like.device).view(-1, 1, 1)
