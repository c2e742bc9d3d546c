"""Between a memory layer's projections and its memories, on the way in and on the way out.

In: causal convolution, SiLU, unit norm per head. Out: RMS norm per head and gate. Both are passes over memory
with little arithmetic. On a CPU they go block by block through the tokens where there is more than one block
of numbers, so that each block stays in a cache; the backward passes recompute what they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.context import traced
from nested_learning.ops.norm import UNIT_FLOOR

# Numbers of one block and thread: a few tensors of this size stay in a core's caches.
BLOCK = 131_072
# What states, decays and solves are computed in.
_STATES = (torch.float32, torch.float64)


def inverse_norm(x: Tensor, scale: float, offset: float) -> Tensor:
    """1 / sqrt(scale ‖x‖² + offset) [..., 1] over the last dimension, in as few kernels as there are.

    A Python number beside a tensor is converted by kernels of its own; `value` and `scalar_tensor` are not.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least = torch.scalar_tensor(offset, dtype=norm.dtype, device=norm.device)
    return torch.addcmul(least, norm, norm, value=scale).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm of x [B, T, ..., d], [B, H, T, d] or, of one token, [B, d], with scales [d].

    On a GPU PyTorch has one kernel for it, on a CPU a chain of them. Here is a shorter one, without gradients
    and in the precision of the states, for single tokens, where the number of kernels is the cost.
    """
    if torch.is_grad_enabled() or not x.is_cpu or x.dtype != weight.dtype or x.dtype not in _STATES:
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.dim() > 2 and 1 not in (x.shape[1], x.shape[-2]):
        return F.rms_norm(x, weight.shape, weight, eps)
    return x * inverse_norm(x, 1 / x.shape[-1], eps) * weight


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """out_t = Σ_j weight[:, j] x_{t+j}: every position of x that has a full window.

    A sum over the K taps rather than F.conv1d: for depthwise kernels of a few taps it spares the
    transposition to channels-first, and its backward pass is no slower on a CPU.

    Args:
        x: [B, K−1+T, channels], the K−1 inputs before the sequence (zeros at its beginning) in front.
        weight: [channels, 1, K] as in nn.Conv1d(groups=channels).

    Returns: [B, T, channels].
    """
    if x.shape[1] == weight.shape[-1]:  # one token
        return (x * weight.permute(1, 2, 0)).sum(1, keepdim=True)
    taps = weight.squeeze(1).unbind(-1)
    T = x.shape[1] - len(taps) + 1
    out = x[:, :T] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        out = torch.addcmul(out, x[:, j : j + T], tap)
    return out


def conv_std(size: int) -> float:
    """Standard deviation of a kernel's taps at the start: a sum over independent inputs keeps their scale."""
    return float(size**-0.5)


def last_inputs(history: Tensor | None, x: Tensor, length: int) -> Tensor:
    """The last `length` inputs [B, length, channels] of x [B, T, channels] and what was before it.

    A copy, as a view would keep all of x.

    Args:
        history: [B, length, channels] the inputs before x; None for zeros.
    """
    if x.shape[1] >= length:
        return x[:, x.shape[1] - length :].clone()
    front = x.new_zeros(len(x), length, x.shape[2]) if history is None else history
    return torch.cat([front[:, x.shape[1] :], x], dim=1)


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

    Args:
        x: [B, T, P·H·d] float32 or float64, P paths of H heads.
        history: [B, K−1, P·H·d] the inputs before the sequence; None for zeros, or where K = 1.
        weight: [P·H·d, 1, K] of a causal depthwise convolution, None for none (K = 1).

    Returns: of each path [B, H, T, d].
    """
    if _plainly(x):
        return _plain_heads(x, history, weight, heads)
    return _UnitHeads.apply(x, history, weight, heads)


def _plain_heads(
    x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads
) -> tuple[Tensor, ...]:
    """The definition."""
    z = x
    if weight is not None:
        before = weight.shape[-1] - 1
        z = F.pad(x, (0, 0, before, 0)) if history is None else torch.cat([history, x], dim=1)
        z = causal_conv(z, weight)
    if x.shape[1] == 1 and not torch.is_grad_enabled() and not traced():
        paths, per_path = len(heads.unit), heads.per_path
        h = F.silu(z).view(len(x), paths, per_path, 1, z.shape[-1] // (paths * per_path))
        f = inverse_norm(h, 1.0, UNIT_FLOOR**2)
        for path, wanted in enumerate(heads.unit):
            if not wanted:
                f[:, path].fill_(1.0)
        return h.mul_(f).unbind(1)
    h = F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1))  # [B, T, P, H, d]
    parts = [
        part * (part.square().sum(-1, keepdim=True) + UNIT_FLOOR**2).rsqrt() if wanted else part
        for part, wanted in zip(h.unbind(2), heads.unit, strict=True)
    ]
    return tuple(part.transpose(1, 2) for part in parts)


class _UnitHeads(torch.autograd.Function):
    """`_plain_heads` in blocks; where the backward pass is to be differentiated again, that itself."""

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
        for rows, columns in _blocks(x, T):
            z = _convolve(_window(x, history, len(taps) - 1, rows, columns), taps)
            h, f = _unit_factors(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            for out, part in zip(outputs, h.mul_(f).unbind(2), strict=True):
                out[rows, :, columns] = part.transpose(1, 2)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, history, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_plain_heads_backward(x, history, weight, ctx.heads, grads), None
        heads, taps = ctx.heads, _taps(x, weight)
        before = len(taps) - 1
        g_x, g_taps = torch.empty_like(x), torch.zeros_like(taps)
        g_history = None if history is None else torch.zeros_like(history)
        for rows, columns in _blocks(x, x.shape[1]):
            window = _window(x, history, before, rows, columns)
            z = _convolve(window, taps)
            y, f = _unit_factors(F.silu(z).unflatten(-1, (len(heads.unit), heads.per_path, -1)), heads)
            y.mul_(f)
            g_z = torch.stack([g[rows, :, columns].transpose(1, 2) for g in grads], dim=2)
            along = (y * g_z).sum(-1, keepdim=True)
            if not all(heads.unit):
                along = along * _wanted(heads, f)
            g_z = g_z.addcmul_(y, along, value=-1).mul_(f).flatten(2)
            torch.ops.aten.silu_backward.grad_input(g_z, z, grad_input=g_z)
            product, count = y.view_as(g_z), g_z.shape[1]  # y is no longer needed
            for j in range(len(taps)):
                torch.mul(g_z, window[:, j : j + count], out=product)
                g_taps[j] += product.sum((0, 1))
            # The last tap is the token's own and comes first, so that every column is set before it is
            # added to.
            torch.mul(g_z, taps[-1], out=g_x[rows, columns])
            for j, tap in enumerate(taps[:-1]):
                start = columns.start - before + j
                outside = max(0, -start)  # columns that lie in the history
                g_x[rows, start + outside : max(0, start + count)].addcmul_(g_z[:, outside:], tap)
                if g_history is not None and outside:
                    inside, first = min(outside, count), columns.start + j
                    g_history[rows, first : first + inside].addcmul_(g_z[:, :inside], tap)
        return g_x, g_history, None if weight is None else g_taps.T.unsqueeze(1), None


def _plain_heads_backward(
    x: Tensor, history: Tensor | None, weight: Tensor | None, heads: Heads, grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradients to x, history and weight, as a graph that can be differentiated again."""
    x = x.view_as(x)
    inputs = [x, *(None if t is None else t.view_as(t) for t in (history, weight))]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    outputs = _plain_heads(x, inputs[1], inputs[2], heads)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _taps(x: Tensor, weight: Tensor | None) -> Tensor:
    """[K, channels]."""
    return x.new_ones(1, x.shape[-1]) if weight is None else weight.squeeze(1).T.contiguous()


def _window(x: Tensor, history: Tensor | None, before: int, rows: slice, columns: slice) -> Tensor:
    """The columns of some rows, with as many as `before` in front [rows, before + columns, channels]."""
    start = columns.start - before
    if start >= 0:
        return x[rows, start : columns.stop]
    own = x[rows, : columns.stop]
    front = x.new_zeros(len(own), before, x.shape[-1]) if history is None else history[rows]
    return torch.cat([front, own], dim=1)[:, columns.start :]


def _convolve(window: Tensor, taps: Tensor) -> Tensor:
    """The convolution of rows [rows, K−1+T, channels] -> [rows, T, channels]."""
    columns = window.shape[1] - len(taps) + 1
    out = window[:, :columns] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        out.addcmul_(window[:, j : j + columns], tap)
    return out


def _unit_factors(h: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """h [..., P, H, d] and the factors [..., P, H, 1] that make it unit-norm; 1 where not wanted."""
    f = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().add_(UNIT_FLOOR**2).rsqrt_()
    return h, f if all(heads.unit) else torch.where(_wanted(heads, f).bool(), f, 1.0)


def _wanted(heads: Heads, like: Tensor) -> Tensor:
    # Each flag is filled in on the device: copying them there would wait for it.
    return torch.cat([like.new_full((1, 1, 1), wanted) for wanted in heads.unit])


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(y) per head, times silu(gate).

    Args:
        y: [B, T, H, d] float32 or float64.
        gate: [B, T, H·d] logits, any floating dtype.
        weight: [d] scales of the norm, in y's dtype.
        eps: of the norm.

    Returns: [B, T, H·d] in the gate's dtype.
    """
    if _plainly(y) or gate.dtype != y.dtype:
        return _plain_gated_norm(y, gate, weight, eps)
    return _GatedNorm.apply(y, gate, weight, eps)


def _plain_gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    norm = F.rms_norm(y, weight.shape, weight, eps) if torch.is_grad_enabled() else rms_norm(y, weight, eps)
    y = norm.flatten(2)
    return (y if y.dtype == gate.dtype else y.to(gate.dtype)) * F.silu(gate)


class _GatedNorm(torch.autograd.Function):
    """`_plain_gated_norm` in blocks; where the backward pass is to be differentiated again, that itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, gate, weight)
        ctx.eps = eps
        out = torch.empty_like(gate)
        for rows, columns in _blocks(gate, gate.shape[1]):
            n, _ = _rms_normalised(y[rows, columns], eps)
            torch.mul(n.mul_(weight).flatten(2), F.silu(gate[rows, columns]), out=out[rows, columns])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = y.view_as(y), gate.view_as(gate), weight.view_as(weight)
            wanted = [t for t in inputs if t.requires_grad]
            out = _plain_gated_norm(*inputs, ctx.eps)
            found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), None
        g_y, g_gate, g_weight = torch.empty_like(y), torch.empty_like(gate), torch.zeros_like(weight)
        for rows, columns in _blocks(gate, gate.shape[1]):
            n, r = _rms_normalised(y[rows, columns], ctx.eps)
            z, g_out = gate[rows, columns], g[rows, columns]
            g_n = (g_out * F.silu(z)).unflatten(2, n.shape[2:])
            scaled = (n * weight).flatten(2).mul_(g_out)
            g_gate[rows, columns] = torch.ops.aten.silu_backward(scaled, z)
            g_weight += (g_n * n).sum((0, 1, 2))
            g_n.mul_(weight)
            along = (g_n * n).mean(-1, keepdim=True)
            g_y[rows, columns] = g_n.addcmul_(n, along, value=-1).mul_(r)
        return g_y, g_gate, g_weight, None


def _rms_normalised(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y / RMS(y), a new contiguous tensor, and the factor."""
    y = y.clone(memory_format=torch.contiguous_format)
    r = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y.mul_(r), r


def _plainly(x: Tensor) -> bool:
    """Whether plain operations on all of x are better: no CPU, little to do, or a tracing transform."""
    return x.device.type != "cpu" or traced() or x.numel() < BLOCK


def _blocks(x: Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Rows of x [B, ..., channels] and columns among `tokens`, in blocks: columns of a row, or whole rows."""
    size = max(1, BLOCK * torch.get_num_threads() // x.shape[-1])
    together = max(1, size // tokens)
    for row in range(0, len(x), together):
        for start in range(0, tokens, size):
            yield slice(row, row + together), slice(start, min(start + size, tokens))
