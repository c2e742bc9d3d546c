"""The backward pass of one chunk of self-modifying Titans; notation as in self_modifying_chunk.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.fused.scratch import Hidden, Scratch, hidden_derivatives, silu_backward_, unscale_
from nested_learning.memory.fused.self_modifying_chunk import (
    Decays,
    Generated,
    Layout,
    Memories,
    Read,
    Written,
    unbound_,
)


class ChunkInputs(NamedTuple):
    """What one chunk was computed from, besides the weights."""

    x: Tensor  # [G, M, C, d] inputs of the generating memories
    q: Tensor | None  # [M, C, d] static queries, None where a memory generates them
    readout: Tensor  # [2, M, 1, d]


class ChunkGradients(NamedTuple):
    """The gradients to what one chunk was computed from."""

    x: Tensor  # [G, M, C, d]
    q: Tensor | None  # [M, C, d]
    readout: Tensor  # [2, M, 1, d]
    logits: Tensor  # [2, M, C] before the gates' sigmoids


def backward_chunk(
    ws: Scratch,
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
    decay, static = made.decay, inputs.q is not None
    q = inputs.q if inputs.q is not None else made.vectors[2]
    at_key = hidden_derivatives(ws, kept.z_k, kept.f_k)
    u = ws.low("u", at_key.u)
    factors = W._replace(W1=ws.low("W1", W.W1), W2=ws.low("W2", W.W2))
    across = torch.addcmul(kept.g, at_key.u, kept.along, value=-1, out=ws("across", kept.g.shape))
    # what W2 writes, up to eta
    direction = ws.mul("direction", across, at_key.first).mul_(kept.f_k * kept.clip)

    moved = torch.sub(after.W2, W.W2_init, out=ws("moved", W.W2.shape))
    at_end = moved.mul_(gW.W2).sum((0, 2, 3)) + ws.mul("product W1", gW.W1, after.W1).sum((0, 2, 3))
    g = _finish_backward(ws, made, u, direction, kept.B, gW)
    g_q, g_total = _read_backward(
        ws, W, q, made.vectors[0], u[-1], direction[-1] * made.eta, kept.B[-1], decay, out, gW, g, gy
    )
    g_total[:, -1] += at_end
    g_k, g_v, g_logits = _write_backward(
        ws, factors, made, kept, at_key, u, across, direction, gW, g, g_total
    )
    vectors = torch.stack([g_k, g_v] if static else [g_k, g_v, g_q])
    g_x, g_readout = _generate_backward(ws, layout, W, made, inputs, vectors, g_logits, gW)
    return ChunkGradients(g_x, g_q if static else None, g_readout, g_logits)


class _Writes(NamedTuple):
    """Gradients to the writes of all memories and to their inputs; buffers."""

    B: Tensor  # [N, M, C, d]
    u: Tensor  # [N, M, C, e]
    a: Tensor  # [N, M, C, e]
    keys: Tensor  # [N, M, C, d]


def _finish_backward(
    ws: Scratch, made: Generated, u: Tensor, direction: Tensor, B: Tensor, gW: Memories
) -> _Writes:
    """Through `finish`; leaves the gradients to the weights before in `gW`."""
    to_end, whole = made.decay.to_end, made.decay.whole
    keys = ws.repeat("keys", ws.low("k", made.vectors[0]), u.shape[0])
    g_W1, g_W2 = ws.low("g_W1", gW.W1), ws.low("g_W2", gW.W2)
    writes = _Writes(
        ws.named_bmm("g_B", u, g_W1.mT).mul_(to_end),
        ws.named_bmm("g_u", B, g_W1).mul_(to_end),
        ws.named_bmm("g_a", keys, g_W2.mT).mul_(to_end),
        ws.named_bmm("g_keys", direction, g_W2).mul_(made.eta * to_end),
    )
    gW.W2_init.addcmul_(gW.W2, 1 - whole)
    gW.W1.mul_(whole)
    gW.W2.mul_(whole)
    return writes


def _read_backward(
    ws: Scratch,
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
    """Through `read`: the gradient to q [M, C, d], and that to T_t (see `_gates_backward`) [M, C]."""
    W1, W2, W2_init = (w[-1] for w in W)
    u_q = ws.silu("u_q", out.z).mul_(out.f)
    scores = ws.bmm(u_q, u.mT).mul_(decay.between)
    g_scores = ws.bmm(gy, B.mT).mul_(decay.between)
    left = gy * decay.since_start
    g_u = ws.add_bmm(ws.bmm(left, W1), g_scores, u)
    ws.add_bmm(gW.W1[-1], left.mT, u_q)
    ws.add_bmm(g.B[-1], scores.mT, gy)
    ws.add_bmm(g.u[-1], g_scores.mT, u_q)

    g_z = silu_backward_(unscale_(ws, g_u, u_q, out.f), out.z)
    g_total = ws.rows_dot(gy, out.out).add_(ws.rows_dot(g_z, out.moved)).squeeze(-1)
    left = g_z * decay.since_start
    g_q = ws.add_bmm(ws.add_bmm(gy.clone(), g_z, W2_init), left, W2 - W2_init)
    ws.add_bmm(gW.W2[-1], left.mT, q)
    ws.add_bmm(gW.W2_init[-1], (g_z - left).mT, q)
    scores = ws.bmm(q, k.mT).mul_(decay.between)
    g_scores = ws.bmm(g_z, a.mT).mul_(decay.between)
    ws.add_bmm(g.a[-1], scores.mT, g_z)
    ws.add_bmm(g_q, g_scores, k)
    ws.add_bmm(g.keys[-1], g_scores.mT, q)
    return g_q, g_total


def _write_backward(
    ws: Scratch,
    W: Memories,
    made: Generated,
    kept: Written,
    at_key: Hidden,
    u: Tensor,
    across: Tensor,
    direction: Tensor,
    gW: Memories,
    g: _Writes,
    g_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through `write`: the gradients to k and v [M, C, d] and to the gates' logits [2, M, C].

    W and u are here as factors of products (`Scratch.low`).
    """
    decay, eta = made.decay, made.eta
    residual = torch.sub(kept.target, made.vectors[0], out=ws("residual", kept.target.shape))
    g_right = torch.matmul(kept.inverse.mT, g.B, out=ws("g_right", g.B.shape))
    from_B = ws.rows_dot(g_right, kept.B).sum(0).squeeze(-1)
    g_gram = ws.named_bmm("g_gram", g_right, kept.B.mT).mul_(decay.erased(ws, eta))
    both = torch.add(g_gram, g_gram.mT, out=ws("g_gram both", g_gram.shape))  # of u uᵀ
    ws.add_bmm(g.u, both, u, alpha=-1)
    g_residual = g_right.mul_(eta)
    from_right = ws.rows_dot(g_residual, residual).sum(0).squeeze(-1)

    dot = ws.rows_dot(direction, g.a)
    from_a = (dot.sum(0) * eta).squeeze(-1)
    g_gradient = g.a.addcmul_(direction, dot.mul_(kept.clip < 1), value=-1).mul_(kept.clip * eta)
    second = across.mul_(g_gradient).mul_(at_key.second)
    p = g_gradient.mul_(at_key.first).mul_(kept.f_k)
    along_p = ws.rows_dot(at_key.u, p)
    dot = ws.rows_dot(p, kept.g).addcmul_(kept.along, along_p, value=-3)
    g_g = torch.addcmul(p, at_key.u, along_p, value=-1, out=at_key.second)
    error = residual.sub_(kept.answer)
    factor = ws.low("g_g", g_g)
    ws.add_bmm(gW.W1, error.mT, factor)
    g_error = ws.named_bmm("g_error", factor, W.W1.mT)
    g_answer = torch.addcmul(g_error, g_residual, decay.before_start, out=residual)  # minus the gradient
    g_residual.add_(g_error)
    factor = ws.low("g_answer", g_answer)
    ws.add_bmm(gW.W1, factor.mT, u, alpha=-1)
    g_u = ws.add_bmm(g.u, factor, W.W1, alpha=-1)
    dot.add_(ws.rows_dot(at_key.u, g_u))
    g_u.addcmul_(p, kept.along, value=-1).addcmul_(kept.g, along_p, value=-1)
    g_u.addcmul_(at_key.u, dot, value=-1)
    g_z = second.addcmul_(g_u, at_key.first).mul_(kept.f_k)

    keys = ws.repeat("keys", ws.low("k", made.vectors[0]), u.shape[0])
    factor = ws.low("g_z", g_z)
    ws.add_bmm(gW.W2, factor.mT, keys)
    g_k = ws.add_bmm(g.keys.sub_(g_residual), factor, W.W2).sum(0)
    g_v = _values_backward(ws, W, made.vectors[1], kept, g_residual, gW)
    return g_k, g_v, _gates_backward(made, from_B, from_right, from_a, g_total)


def _values_backward(
    ws: Scratch, W: Memories, v: Tensor, kept: Written, g_target: Tensor, gW: Memories
) -> Tensor:
    """Through the targets: the gradient to v. Overwrites g_target."""
    u = ws.silu("h", kept.z_v).mul_(kept.f_v)
    g_out = unbound_(ws, g_target, kept.target, kept.f_t)
    factor = ws.low("g_z", g_out)
    ws.add_bmm(gW.W1, factor.mT, u)
    g_z = silu_backward_(unscale_(ws, ws.named_bmm("g_u", factor, W.W1), u, kept.f_v), kept.z_v)
    values = ws.repeat("keys", ws.low("k", v), u.shape[0])
    factor = ws.low("g_z", g_z)
    ws.add_bmm(gW.W2, factor.mT, values)
    return ws.add_bmm(g_out, factor, W.W2).sum(0)


def _gates_backward(
    made: Generated, from_B: Tensor, from_right: Tensor, from_a: Tensor, g_total: Tensor
) -> Tensor:
    """The gradients to the gates' logits [2, M, C], by Euler's identity (see self_modifying_chunk.py).

    With T_t = Σ_{s≤t} log α_s: a write at s is scaled by exp(−T_s), what is read or kept at t by exp(T_t),
    and what a token erases by exp(T_t − log α_t).
    """
    g_total = g_total - from_right - from_a
    g_log = g_total.flip(-1).cumsum(-1).flip(-1) + from_right - from_B
    return torch.stack([from_B + from_a, g_log.masked_fill_(made.clamped, 0.0)]).mul_(1 - made.sigmoids)


def _generate_backward(
    ws: Scratch,
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
    u = ws.silu("u generated", made.z).mul_(made.f)
    g_x, g_u = ws("g_x", x.shape), ws("g_u generated", u.shape)
    g_x[:V] = unbound_(ws, g_vectors, made.vectors, made.f_out)
    ws.bmm(g_x[:V], W.W1[:V], out=g_u[:V])
    ws.add_bmm(gW.W1[:V], g_x[:V].mT, u[:V])
    torch.mul(g_logits, readout, out=g_x[V:])
    torch.mul(g_logits, made.folded, out=g_u[V:])
    g_folded = (u[V:] * g_logits).sum(-2, keepdim=True)
    g_readout = (x[V:] * g_logits).sum(-2, keepdim=True).add_(ws.rows_dot(W.W1[V:G], g_folded).mT)
    gW.W1[V:G].addcmul_(readout.mT, g_folded)
    g_z = silu_backward_(unscale_(ws, g_u, u, made.f), made.z)
    factor = ws.low("g_z generated", g_z)
    ws.add_bmm(gW.W2[:G], factor.mT, x)
    return ws.add_bmm(g_x, factor, W.W2[:G]), g_readout
