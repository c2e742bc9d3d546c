"""The backward pass of one chunk of self-modifying Titans; shapes and method as in fused_chunk.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.fused_chunk import (
    Decays,
    Generated,
    Layout,
    Memories,
    Read,
    Written,
    accumulate,
    bmm,
    decays,
    rows_dot,
    silu_backward,
    unscale_,
)


class ChunkInputs(NamedTuple):
    """What one chunk was computed from, besides the weights."""

    x: Tensor  # [G, M, C, d] inputs of the generating memories
    q: Tensor | None  # [M, C, d] static queries, None where a memory generates them
    readout: Tensor  # [2, M, d, 1]


class ChunkGradients(NamedTuple):
    """The gradients to what one chunk was computed from."""

    x: Tensor  # [G, M, C, d]
    q: Tensor | None  # [M, C, d]
    readout: Tensor  # [2, M, d, 1]
    logits: Tensor  # [2, M, C] before the gates' sigmoids


@dataclass
class _Hidden:
    """The hidden vectors at the keys, recomputed, with the derivatives of silu."""

    u: Tensor
    first: Tensor  # silu′(z)
    second: Tensor  # silu″(z)

    @classmethod
    def at(cls, z: Tensor, f: Tensor) -> _Hidden:
        s = torch.sigmoid(z)
        h = z * s
        u = h * f
        slope = torch.addcmul(s, s, s, value=-1)  # s (1 − s)
        h.addcmul_(h, s, value=-1)  # z s (1 − s)
        # silu″ = s (1 − s) (2 + z (1 − 2 s)); silu′ = s + z s (1 − s)
        second = slope.mul_(2).add_(h).addcmul_(h, s, value=-2)
        return cls(u, s.add_(h), second)


def backward_chunk(
    layout: Layout,
    W: Memories,
    after: Memories,
    inputs: ChunkInputs,
    saved: tuple[Generated, Written, Read],
    gW: Memories,
    gy: Tensor,
) -> ChunkGradients:
    """From the gradients at a chunk's end to those at its start.

    Args:
        W, after: the weights before and after the chunk.
        gW: the gradients to `after`; overwritten by those to `W` (that to W2_init is added to).
        gy: [M, C, d].
    """
    made, kept, out = saved
    k, v = made.vectors[0], made.vectors[1]
    q = inputs.q if inputs.q is not None else made.vectors[2]
    decay = decays(made.log_alpha)
    at_key = _Hidden.at(kept.z_k, kept.f_k)
    across = torch.addcmul(kept.g, at_key.u, kept.along, value=-1)
    # the clipped gradient of W2, minus sign taken: what W2 writes, up to eta
    direction = (across * at_key.first).mul_(kept.f_k * kept.clip)

    at_end = (gW.W1 * after.W1).sum((0, 2, 3)) + (gW.W2 * (after.W2 - W.W2_init)).sum((0, 2, 3))
    g = _finish_backward(W, k, at_key.u, direction, made.eta, kept.B, decay, gW)
    g_q, along_rows = _read_backward(
        W, q, k, at_key.u, direction[-1] * made.eta, kept.B[-1], decay, out, gW, g, gy
    )
    along_rows[:, -1] += at_end
    g_k, g_v, g_logits = _write_backward(W, made, kept, at_key, across, direction, decay, gW, g, along_rows)
    vectors = [g_k, g_v] if inputs.q is not None else [g_k, g_v, g_q]
    g_x, g_readout = _generate_backward(layout, W, made, inputs, torch.stack(vectors), g_logits, gW)
    return ChunkGradients(g_x, g_q if inputs.q is not None else None, g_readout, g_logits)


class _Writes(NamedTuple):
    """Gradients to the writes of all memories and to their inputs."""

    B: Tensor  # [N, M, C, d]
    u: Tensor  # [N, M, C, e]
    a: Tensor  # [N, M, C, e]
    keys: Tensor  # [N, M, C, d]


def _finish_backward(
    W: Memories, k: Tensor, u: Tensor, direction: Tensor, eta: Tensor, B: Tensor, decay: Decays, gW: Memories
) -> _Writes:
    """Through `finish`; leaves the gradients to the weights before in `gW`."""
    keys = k.expand(u.shape[0], *k.shape).contiguous()
    writes = _Writes(
        bmm(u, gW.W1.mT).mul_(decay.to_end),
        bmm(B, gW.W1).mul_(decay.to_end),
        bmm(keys, gW.W2.mT).mul_(decay.to_end),
        bmm(direction, gW.W2).mul_(eta * decay.to_end),
    )
    gW.W2_init.addcmul_(gW.W2, 1 - decay.whole)
    gW.W1.mul_(decay.whole)
    gW.W2.mul_(decay.whole)
    return writes


def _read_backward(
    W: Memories,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    a: Tensor,
    B: Tensor,
    decay: Decays,
    out: Read,
    gW: Memories,
    g: _Writes,
    gy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Through `read`: the gradient to q, and ⟨∂L/∂log⟩ of what decays from the start to each token."""
    W1, W2, W2_init = (w[-1] for w in W)
    u = u[-1]
    u_q = torch.nn.functional.silu(out.z).mul_(out.f)
    scores = torch.bmm(u_q, u.mT).mul_(decay.between)
    g_scores = torch.bmm(gy, B.mT).mul_(decay.between)
    left = gy * decay.since_start
    g_u = torch.bmm(left, W1).baddbmm_(g_scores, u)
    gW.W1[-1].baddbmm_(left.mT, u_q)
    g.B[-1].baddbmm_(scores.mT, gy)
    g.u[-1].baddbmm_(g_scores.mT, u_q)

    g_z = silu_backward(unscale_(g_u, u_q, out.f), out.z)
    rows = rows_dot(gy, out.out).add_(rows_dot(g_z, out.moved)).squeeze(-1)
    left = g_z * decay.since_start
    g_q = torch.baddbmm(gy, g_z, W2_init).baddbmm_(left, W2 - W2_init)
    gW.W2[-1].baddbmm_(left.mT, q)
    gW.W2_init[-1].baddbmm_((g_z - left).mT, q)
    scores = torch.bmm(q, k.mT).mul_(decay.between)
    g_scores = torch.bmm(g_z, a.mT).mul_(decay.between)
    g.a[-1].baddbmm_(scores.mT, g_z)
    g_q.baddbmm_(g_scores, k)
    g.keys[-1].baddbmm_(g_scores.mT, q)
    return g_q, rows


def _write_backward(
    W: Memories,
    made: Generated,
    kept: Written,
    at_key: _Hidden,
    across: Tensor,
    direction: Tensor,
    decay: Decays,
    gW: Memories,
    g: _Writes,
    along_rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through `write`: the gradients to k and v [M, C, d] and to the gates' logits [2, M, C]."""
    k, v, u, eta = made.vectors[0], made.vectors[1], at_key.u, made.eta
    residual = kept.target - k
    g_right = bmm(kept.inverse.mT, g.B)
    from_B = rows_dot(g_right, kept.B).sum(0).squeeze(-1)
    g_gram = bmm(g_right, kept.B.mT).mul_(eta * decay.before)
    accumulate(g.u, g_gram, u, alpha=-1)
    accumulate(g.u, g_gram.mT, u, alpha=-1)
    g_residual = g_right.mul_(eta)
    from_right = rows_dot(g_residual, residual).sum(0).squeeze(-1)

    dot = rows_dot(direction, g.a)
    from_a = (dot.sum(0) * eta).squeeze(-1)
    g_gradient = g.a.addcmul_(direction, dot.mul_(kept.clip < 1), value=-1).mul_(kept.clip * eta)
    second = across.mul_(g_gradient).mul_(at_key.second)
    p = g_gradient.mul_(at_key.first).mul_(kept.f_k)
    along_p = rows_dot(u, p)
    dot = rows_dot(p, kept.g).addcmul_(kept.along, along_p, value=-3)
    g_g = torch.addcmul(p, u, along_p, value=-1)
    error = residual.sub_(kept.answer)
    accumulate(gW.W1, error.mT, g_g)
    g_error = bmm(g_g, W.W1.mT)
    g_answer = torch.addcmul(g_error, g_residual, decay.before_start)  # minus the gradient
    g_residual.add_(g_error)
    accumulate(gW.W1, g_answer.mT, u, alpha=-1)
    g_u = accumulate(g.u, g_answer, W.W1, alpha=-1)
    dot.add_(rows_dot(u, g_u))
    g_u.addcmul_(p, kept.along, value=-1).addcmul_(kept.g, along_p, value=-1).addcmul_(u, dot, value=-1)
    g_z = second.addcmul_(g_u, at_key.first).mul_(kept.f_k)

    keys = k.expand(u.shape[0], *k.shape).contiguous()
    accumulate(gW.W2, g_z.mT, keys)
    g_k = accumulate(g.keys.sub_(g_residual), g_z, W.W2).sum(0)
    g_v = _values_backward(W, v, kept, g_residual, gW)
    return g_k, g_v, _gates_backward(made, from_B, from_right, from_a, along_rows)


def _values_backward(W: Memories, v: Tensor, kept: Written, g_target: Tensor, gW: Memories) -> Tensor:
    """Through the targets unit(M(v)): the gradient to v."""
    u = torch.nn.functional.silu(kept.z_v).mul_(kept.f_v)
    g_out = unscale_(g_target, kept.target, kept.f_t)
    accumulate(gW.W1, g_out.mT, u)
    g_z = silu_backward(unscale_(bmm(g_out, W.W1), u, kept.f_v), kept.z_v)
    values = v.expand(u.shape[0], *v.shape).contiguous()
    accumulate(gW.W2, g_z.mT, values)
    return accumulate(g_out, g_z, W.W2).sum(0)


def _gates_backward(
    made: Generated, from_B: Tensor, from_right: Tensor, from_a: Tensor, along_rows: Tensor
) -> Tensor:
    """The gradients to the gates' logits [2, M, C], by Euler's identity (see the module docstring).

    With T_t = Σ_{s≤t} log α_s: a write at s is scaled by exp(−T_s), what is read or kept at t by exp(T_t),
    and what a token erases by exp(T_t − log α_t).
    """
    g_total = along_rows - from_right - from_a
    g_log = g_total.flip(-1).cumsum(-1).flip(-1) + from_right - from_B
    g_log = g_log.masked_fill_(made.clamped, 0.0)
    return torch.stack([from_B + from_a, g_log]).mul_(1 - made.sigmoids)


def _generate_backward(
    layout: Layout,
    W: Memories,
    made: Generated,
    inputs: ChunkInputs,
    g_vectors: Tensor,
    g_logits: Tensor,
    gW: Memories,
) -> tuple[Tensor, Tensor]:
    """Through `generate`: the gradients to x and to the readouts."""
    V, G = layout.vectors, layout.generating
    x, readout, g_logits = inputs.x, inputs.readout, g_logits.unsqueeze(-1)
    u = torch.nn.functional.silu(made.z).mul_(made.f)
    g_x, g_u = torch.empty_like(x), torch.empty_like(u)
    g_x[:V] = unscale_(g_vectors, made.vectors, made.f_out)
    torch.mul(g_logits, readout.mT, out=g_x[V:])
    torch.bmm(g_x[:V].flatten(0, 1), W.W1[:V].flatten(0, 1), out=g_u[:V].flatten(0, 1))
    torch.mul(g_logits, bmm(W.W1[V:G].mT, readout).mT, out=g_u[V:])
    g_folded = bmm(u[V:].mT, g_logits)  # to W1ᵀ w
    g_readout = bmm(x[V:].mT, g_logits)
    accumulate(g_readout, W.W1[V:G], g_folded)
    accumulate(gW.W1[:V], g_x[:V].mT, u[:V])
    accumulate(gW.W1[V:G], readout, g_folded.mT)
    g_z = silu_backward(unscale_(g_u, u, made.f), made.z)
    accumulate(gW.W2[:G], g_z.mT, x)
    return accumulate(g_x, g_z, W.W2[:G]), g_readout
