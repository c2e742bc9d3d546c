"""One chunk of Titans' memory, forward and backward by hand: gradient descent with momentum on one MLP.

Shapes: M = B·H rows, C tokens, d head width, e hidden width. Notation as in `ops/delta_rule`: gamma_t and m_t
are the products of the retentions and of the momentum decays up to token t, P_ts = Σ_r Γ_tr M_rs is what the
weights at t hold of the write at s, c_t what they hold of the momentum before the chunk.

Both matrices are kept transposed, [d_in, d_out], on top of each other and of the chunk's writes: what a token
reads is then one product,

    o = [γ x, c x, (x Xᵀ) ⊙ P] [W; S; A]        x the queries, X the keys of that matrix, A the writes,

and so are the gradients to everything on the right. W2 is kept as V2 = W2 − W2_init, which decays to zero.
Of the [C, C] decays only P has its gradient formed. Those to the logs follow from it, as with the cumulative
logs T and U it is P_ts = e^(T_t) Σ_r e^(U_r − T_r) e^(−U_s).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.fused.scratch import LOG_FLOOR, Scratch, hidden, silu_backward_


class Gates(NamedTuple):
    """The gates of all chunks, [n, M, C, 1] where not noted."""

    rate: Tensor  # eta, times 1 − mu where writes are scaled so
    sigmoids: Tensor  # [3, n, M, C] of the logits eta, alpha, mu
    total: Tensor  # [2, n, M, C, 1] cumulative logs T and U of the decays within their chunk
    clamped: Tensor  # [2, n, M, C] where a log is below the floor, and has no gradient


class Decays(NamedTuple):
    """Products of the decays of one chunk."""

    gamma: Tensor  # [M, C, 1]
    alpha: Tensor  # [M, C, C] Γ
    mu: Tensor  # [M, C, C] the same of the momentum
    m: Tensor  # [M, C, 1]
    P: Tensor  # [M, C, C]
    c: Tensor  # [M, C, 1]


class Saved(NamedTuple):
    """What the backward pass needs of one chunk."""

    R1: Tensor  # [M, 2e + C, d]  W1, S1 before the chunk and its writes
    R2: Tensor  # [M, 3d + C, e]  V2, S2 before the chunk, W2_init and the writes
    z: Tensor  # [M, C, e] W2 k
    f: Tensor  # [M, C, 1]
    error: Tensor  # [M, C, d] v − M(k)
    g: Tensor  # [M, C, e] W1ᵀ error
    along: Tensor  # [M, C, 1]
    clip: Tensor  # [M, C, 1]
    raw2: Tensor  # [M, C, C] q Kᵀ
    z_q: Tensor  # [M, C, e]
    f_q: Tensor  # [M, C, 1]
    raw1: Tensor  # [M, C, C] u(q) U(k)ᵀ
    decay: Decays


def gates(logits: Tensor, eta_max: float, scaled: bool, chunk_size: int) -> Gates:
    """From the logits [3, B, H, T] of eta, alpha and mu."""
    logits = logits.flatten(1, 2).unflatten(-1, (-1, chunk_size)).transpose(1, 2)  # [3, n, M, C]
    sigmoids = torch.sigmoid(logits)
    rate = eta_max * sigmoids[0]
    if scaled:
        rate = rate * torch.sigmoid(-logits[2])  # 1 − mu
    log = F.logsigmoid(logits[1:])
    total = log.clamp_min(LOG_FLOOR).cumsum(-1).unsqueeze(-1)
    return Gates(rate.unsqueeze(-1), sigmoids, total, log < LOG_FLOOR)


def decays(total: Tensor) -> Decays:
    """The products within one chunk, from T and U [2, M, C, 1]."""
    since_start = total.exp()
    # above the diagonal the exponential may overflow: those entries are set, not multiplied, to zero
    between = (total - total.mT).exp_().tril_()
    P = torch.bmm(between[0], between[1])
    return Decays(
        since_start[0], between[0], between[1], since_start[1], P, P[..., :1] * since_start[1, :, :1]
    )


def left_factor(ws: Scratch, name: str, x: Tensor, raw: Tensor, decay: Decays, plain: bool) -> Tensor:
    """[γ x, c x, raw ⊙ P], with x itself before the last part if `plain`."""
    width, C = x.shape[-1], raw.shape[-1]
    count = 3 if plain else 2
    left = ws(name, (*x.shape[:-1], count * width + C))
    torch.mul(x, decay.gamma, out=left[..., :width])
    torch.mul(x, decay.c, out=left[..., width : 2 * width])
    if plain:
        left[..., 2 * width : 3 * width] = x
    torch.mul(raw, decay.P, out=left[..., count * width :])
    return left


def forward_chunk(
    ws: Scratch, R1: Tensor, R2: Tensor, k: Tensor, v: Tensor, q: Tensor, rate: Tensor, total: Tensor
) -> tuple[Tensor, Saved]:
    """The read-out [M, C, d] of a chunk. Fills the rows of `R1` and `R2` that hold its writes."""
    d, e = k.shape[-1], R2.shape[-1]
    W1, A1, A2 = R1[:, :e], R1[:, 2 * e :], R2[:, 3 * d :]
    decay = decays(total)
    z = ws.bmm(k, torch.add(R2[:, :d], R2[:, 2 * d : 3 * d], out=ws("W2", (len(k), d, e))))
    u, f = hidden(ws, "u", z)
    error = ws.add_bmm(torch.sub(v, k), u, W1, alpha=-1)
    g = ws.bmm(error, W1.mT)
    along = ws.rows_dot(u, g)
    gradient = torch.addcmul(g, u, along, value=-1, out=ws("gradient", g.shape)).mul_(f)
    gradient = silu_backward_(gradient, z)
    clip = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    torch.mul(gradient, clip * rate, out=A2)
    torch.mul(error, rate, out=A1)

    raw2 = ws.bmm(q, k.mT)
    z_q = ws.bmm(left_factor(ws, "left 2", q, raw2, decay, plain=True), R2)
    u_q, f_q = hidden(ws, "u_q", z_q)
    raw1 = ws.bmm(u_q, u.mT)
    y = ws.add_bmm(q.clone(), left_factor(ws, "left 1", u_q, raw1, decay, plain=False), R1)
    return y, Saved(R1, R2, z, f, error, g, along, clip, raw2, z_q, f_q, raw1, decay)


def ends(decay: Decays) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the end of the chunk holds: gamma_C, c_C, m_C [M, 1, 1], and of its writes P_C, M_C [M, C, 1]."""
    last = slice(-1, None)
    return (
        decay.gamma[:, last],
        decay.c[:, last],
        decay.m[:, last],
        decay.P[:, -1].unsqueeze(-1),
        decay.mu[:, -1].unsqueeze(-1),
    )


def finish(ws: Scratch, saved: Saved, k: Tensor, next1: Tensor, next2: Tensor) -> None:
    """Write the weights and momenta after the chunk into the rows for them of `next1` and `next2`."""
    d = k.shape[-1]
    u = ws("u", saved.z.shape)  # as forward_chunk left it
    _advance(ws, saved.decay, u, saved.R1, saved.R1[:, 2 * u.shape[-1] :], next1)
    _advance(ws, saved.decay, k, saved.R2, saved.R2[:, 3 * d :], next2)
    next2[:, 2 * d : 3 * d] = saved.R2[:, 2 * d : 3 * d]


def end_keys(ws: Scratch, x: Tensor, P_end: Tensor, M_end: Tensor) -> Tensor:
    """[M, C, 2 d_in] the inputs as the weights and the momentum at the end of the chunk hold their writes."""
    width = x.shape[-1]
    keys = ws(("keys", width), (*x.shape[:-1], 2 * width))
    torch.mul(x, P_end, out=keys[..., :width])
    torch.mul(x, M_end, out=keys[..., width:])
    return keys


def _advance(ws: Scratch, decay: Decays, x: Tensor, R: Tensor, A: Tensor, after: Tensor) -> None:
    width = x.shape[-1]
    gamma, c, m, P_end, M_end = ends(decay)
    keys = end_keys(ws, x, P_end, M_end)
    written = ws.bmm(keys.mT, A, out=ws(("written", *R.shape), (len(x), 2 * width, R.shape[-1])))
    W, S = R[:, :width], R[:, width : 2 * width]
    torch.addcmul(written[:, :width], W, gamma, out=after[:, :width]).addcmul_(S, c)
    torch.addcmul(written[:, width:], S, m, out=after[:, width : 2 * width])
