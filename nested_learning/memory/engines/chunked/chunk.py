"""A chunk of Titans or self-modifying Titans, forward and backward: its signals, and the order of its steps.

Shapes and notation as in memory.py. Two systems run through the same steps (eq 86-88):

    Titans                     self-modifying Titans
    k, v, q, gates given       k, v (q) and the gates from memories of their own, at the anchor (eq 86)
    target v                   each memory's own target v̂ = M(v) (eq 87)
    W1 by gradient descent     W1 by DGD, which erases (eq 88)
    momentum                   none
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.engines.chunked.memory import (
    ChunkGates,
    Evaluated,
    MatrixRead,
    Momentum,
    WeightMatrix,
    Written,
    end,
    evaluate,
    hidden,
    read,
    silu,
    through_hidden,
    write,
)
from nested_learning.memory.engines.chunked.memory_backward import (
    Logs,
    MatrixBackward,
    evaluate_backward,
    slopes,
    write_backward,
)
from nested_learning.memory.engines.chunked.scratch import Scratch
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.delta_rule.chunk import LOG_FLOOR


class ChunkInputs(NamedTuple):
    """The tensors that one chunk is a function of, besides the weights."""

    x: Tensor  # [n, M, C, d] inputs of the generating memories, vectors before gates; without these k and v
    q: Tensor | None  # [M, C, d], None where a memory generates it
    logits: Tensor | None  # [3, M, C] of eta, alpha and mu, None where memories generate them
    readout: Tensor | None  # [2, M, 1, d] w and bias [2, M, 1] of eta and alpha where memories do
    bias: Tensor | None


class ChunkGradients(NamedTuple):
    """The gradients to what one chunk is a function of, besides the weights."""

    k: Tensor  # [M, C, d] to the input paths
    v: Tensor
    q: Tensor
    logits: Tensor  # [2 or 3, M, C]
    readout: Tensor | None  # [2, M, 1, d]


class Generated(NamedTuple):
    """The signals that memories generate, and tensors that their gradient needs."""

    vectors: Evaluated  # of k, v and, with adaptive q, q
    z: Tensor  # [2, M, C, e] W2 x of the gates' memories
    f: Tensor  # [2, M, C, 1]
    folded: Tensor  # [2, M, 1, e] W1ᵀ w


class Kept(NamedTuple):
    """Tensors of one chunk that the backward pass needs."""

    W1: WeightMatrix  # before the chunk
    W2: WeightMatrix
    generated: Generated | None
    gates: ChunkGates
    targets: Evaluated | None
    written: Written
    read2: MatrixRead
    f_q: Tensor  # [1, M, C, 1]
    read1: MatrixRead


def gates_of(system: MemorySystem, logits: Tensor) -> ChunkGates:
    """From the logits of eta, alpha and, with momentum, mu."""
    sigmoids = torch.sigmoid(logits)
    most = (1 + sigmoids[1]).clamp_max(system.eta_max) if system.capped else system.eta_max
    eta = most * sigmoids[0]
    if system.momentum and system.momentum_scaled:
        eta = eta * torch.sigmoid(-logits[2])  # 1 − μ
    log = F.logsigmoid(logits[1:])
    clamped = log < LOG_FLOOR
    log, eta = log.clamp_min(LOG_FLOOR).unsqueeze(-1), eta.unsqueeze(-1)
    if system.pace is not None:
        pace = paces(system, eta)
        log, eta = log.unsqueeze(1) * pace, eta * pace
    total = log.cumsum(-2)  # T and U
    since_start = total.exp()
    # above the diagonal the exponential may overflow: those entries are set, not multiplied, to zero
    between = (total - total.mT).exp_().tril_()
    if system.momentum:
        P, m = torch.bmm(between[0], between[1]), since_start[1]
        momentum = Momentum(between[0], between[1], m, P[..., :1] * m[:, :1])
        return ChunkGates(sigmoids, clamped, eta, since_start[0], P, momentum, None, None)
    Gamma = between[0]
    erased = F.pad(eta[..., 1:, :] * Gamma[..., :-1, :], (0, 0, 1, 0))
    return ChunkGates(sigmoids, clamped, eta, since_start[0], Gamma, None, (total - log)[0].exp_(), erased)


def paces(system: MemorySystem, like: Tensor) -> Tensor:
    """The pace of each memory [N, 1, 1, 1]: that of the generating ones, and 1."""
    assert system.pace is not None
    slow = like.new_full((len(system.generated),), system.pace)
    return F.pad(slow, (0, 1), value=1.0).view(-1, 1, 1, 1)


def gates_backward(system: MemorySystem, gates: ChunkGates, logs: Logs) -> Tensor:
    """The gradients to the logits [2 or 3, M, C], from those to logarithms (see `Logs`)."""
    if gates.momentum is not None and logs.P is not None:
        Gamma, Mu, m, _ = gates.momentum
        P_C, M_C, Gamma_C = (D[:, -1].unsqueeze(-1) for D in (gates.P, Mu, Gamma))  # [M, C, 1]
        # P_ts = e^(T_t) Σ_r e^(U_r − T_r) e^(−U_s) and c_t = e^(T_t) Σ_r e^(U_r − T_r). Besides reads at t
        # and the writes at s there is what passes from the momentum into the weights at r:
        carried = (torch.bmm(Gamma.mT, logs.P[0]) * Mu).sum(-1, keepdim=True)
        carried = carried + m * torch.bmm(Gamma.mT, logs.c)
        carried = (carried + Gamma_C * (torch.bmm(Mu, logs.P_C) + m * logs.c_C)).squeeze(-1)
        # The writes once more from what `carried` is made of, as where μ is small the two nearly cancel.
        written = (logs.P[0] * gates.P).sum(-2) + (P_C * logs.P_C + M_C * logs.M_C).squeeze(-1)
        totals = torch.stack([logs.read - carried, carried - written])
        ends = torch.stack([logs.end_T, logs.end_U])
    else:
        totals, ends = (logs.read - logs.decayed + logs.erased).unsqueeze(0), logs.end_T.unsqueeze(0)
    # T_t = Σ_{s≤t} log α_s; that of the last token holds all of them. T_{t−1} lacks log α_t.
    g_log = totals.flip(-1).cumsum(-1).flip(-1) + ends.unsqueeze(-1)
    if gates.momentum is None:
        g_log = g_log - logs.erased
    g_log = torch.cat([logs.written.unsqueeze(0), g_log.masked_fill(gates.clamped, 0.0)])
    if system.capped:  # η has the factor min(eta_max, 1 + α)
        alpha = gates.sigmoids[1]
        slope = (alpha / (1 + alpha)).masked_fill(1 + alpha > system.eta_max, 0.0)
        g_log = torch.stack([g_log[0], torch.addcmul(g_log[1], logs.written, slope)])
    g_logits = g_log * (1 - gates.sigmoids)
    if system.momentum and system.momentum_scaled:  # the rate has the factor 1 − μ
        g_mu = torch.addcmul(g_logits[2], logs.written, gates.sigmoids[2], value=-1)
        g_logits = torch.stack([g_logits[0], g_logits[1], g_mu])
    return g_logits


def generate(ws: Scratch, W1: Tensor, W2: Tensor, given: ChunkInputs) -> tuple[Generated, Tensor]:
    """The vectors and the logits [2, M, C] of the gates that memories generate at the anchor (eq 86).

    A gate needs ⟨w, x + W1 u⟩ alone, which is ⟨w, x⟩ + ⟨W1ᵀ w, u⟩: no product over the tokens.
    """
    assert given.readout is not None and given.bias is not None  # noqa: PT018
    x, V, G = given.x, len(given.x) - 2, len(given.x)
    vectors = evaluate(ws, "u vectors", W1[:V], W2[:V], x[:V].clone())
    z = ws.bmm(x[V:], W2[V:G].mT)
    u, f = hidden(ws, "u gates", z)
    folded = (W1[V:G] * given.readout.mT).sum(-2, keepdim=True)
    logits = ws.dot(x[V:], given.readout).add_(ws.dot(u, folded)).squeeze(-1).add_(given.bias)
    return Generated(vectors, z, f, folded), logits


def generate_backward(
    m1: MatrixBackward,
    m2: MatrixBackward,
    given: ChunkInputs,
    kept: Generated,
    g_vectors: Tensor,
    g_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through `generate`: the gradients to the inputs of vectors and of gates, and to the readouts."""
    assert given.readout is not None
    ws, x, readout, g_logits = m1.ws, given.x, given.readout, g_logits.unsqueeze(-1)
    V = len(x) - 2
    g_x = evaluate_backward(m1, m2, "u vectors", slice(0, V), x[:V], kept.vectors, g_vectors)
    at, x = slice(V, V + 2), x[V:]
    u = ws("u gates", silu, kept.z).mul_(kept.f)
    g_folded = (u * g_logits).sum(-2, keepdim=True)
    g_readout = (x * g_logits).sum(-2, keepdim=True) + ws.dot(m1.matrix.W[at], g_folded).mT
    m1.g_W = ws.add_bmm(m1.g_W, readout.mT, g_folded, at=at)
    g_u = ws("g_u gates", torch.mul, g_logits, kept.folded)
    g_z, _ = through_hidden(ws, "g_u gates", g_u, u, kept.z, kept.f)
    low = ws.low("g_z gates", g_z)
    m2.g_W = ws.add_bmm(m2.g_W, low.mT, x, at=at)
    return g_x, ws.add_bmm(g_logits * readout, low, m2.low_W[at]), g_readout


def forward_chunk(
    ws: Scratch, system: MemorySystem, given: ChunkInputs, W1: WeightMatrix, W2: WeightMatrix
) -> tuple[Tensor, WeightMatrix, WeightMatrix, Tensor, Kept]:
    """One chunk.

    Args:
        W1, W2: the anchors, the weights at the boundary before the chunk (eq 90).

    Returns:
        y [M, C, d], W1 and W2 after the chunk, the error v̂ − M(k) [M, C, d] of the memory that is read out,
        and what the backward pass needs.
    """
    generated = targets = None
    if given.logits is None:
        generated, logits = generate(ws, W1.W, W2.W, given)
        vectors = generated.vectors.y
    else:
        logits, vectors = given.logits, given.x
    gates, N = gates_of(system, logits), len(W1.W)
    k, v, q = vectors[0], vectors[1], vectors[2:3] if given.q is None else given.q.unsqueeze(0)
    keys = k.unsqueeze(0) if N == 1 else ws("keys", torch.stack, [k] * N)
    if system.self_targets:
        targets = evaluate(ws, "u", W1.W, W2.W, v.repeat(N, 1, 1, 1))
    residual = torch.sub(v, k).unsqueeze(0) if targets is None else ws("residual", torch.sub, targets.y, k)
    last = gates if system.pace is None else gates.of_last()
    written, u, A2 = write(ws, gates, W1.W, W2.W, keys, residual, delta=targets is not None)
    # y_t = M_t(q_t) with the weights after the token's own write (eq 89, read="token")
    read2 = read(ws, last, W2, q, keys, A2)
    u_q, f_q = hidden(ws, "u_q", read2.o)
    read1 = read(ws, last, W1, u_q, u, written.A)
    kept = Kept(W1, W2, generated, gates, targets, written, read2, f_q, read1)
    after = end(ws, gates, W1, "u", u, written.A), end(ws, gates, W2, "keys", keys, A2)
    return (q + read1.o)[0], *after, written.error[-1], kept


def backward_chunk(
    ws: Scratch,
    system: MemorySystem,
    given: ChunkInputs,
    kept: Kept,
    after: tuple[WeightMatrix, WeightMatrix],
    g_after: tuple[WeightMatrix, WeightMatrix],
    gy: Tensor,
) -> tuple[tuple[WeightMatrix, WeightMatrix], ChunkGradients]:
    """From the gradients at a chunk's end to those at its start: to W1, W2 and the inputs.

    Args:
        after, g_after: W1 and W2 after the chunk, and the gradients to them. With buffers, those of the last
            call are overwritten.
        gy: [M, C, d].
    """
    gates, generated, targets = kept.gates, kept.generated, kept.targets
    vectors, N = given.x if generated is None else generated.vectors.y, len(kept.W1.W)
    k, v, q = vectors[0], vectors[1], vectors[2:3] if given.q is None else given.q.unsqueeze(0)
    written, at_key = kept.written, slopes(ws, kept.written)
    last, pace = gates, None
    if system.pace is not None:
        last, pace = gates.of_last(), paces(system, gy)
    column = torch.zeros_like(last.eta)  # [M, C, 1]
    row, one = column[..., 0], column[:, 0, 0]
    logs = Logs(row, one, one, row, row, row, column, column, column, column[:, :1], pace=pace)
    keys = k.unsqueeze(0) if N == 1 else ws("keys", torch.stack, [k] * N)
    m1 = MatrixBackward(ws, gates, logs, "1", kept.W1, at_key.u, written.A, 1.0, *g_after[0])
    m2 = MatrixBackward(ws, gates, logs, "2", kept.W2, keys, at_key.direction, gates.eta, *g_after[1])
    m1.end(after[0])
    m2.end(after[1])

    # y = q + W1_t u_q, u_q = n(σ(W2_t q))
    gy = gy.unsqueeze(0)
    u_q = ws("u_q", silu, kept.read2.o).mul_(kept.f_q)
    g_u = m1.read(last, u_q, kept.read1, gy)
    g_z, _ = through_hidden(ws, "g_z_q", g_u, u_q, kept.read2.o, kept.f_q)
    g_q = m2.read(last, q, kept.read2, g_z).add_(gy)

    residual = None if targets is None else ws("residual", torch.sub, targets.y, k)
    g_residual = write_backward(m1, m2, written, at_key, residual)
    g_k = m2.g_X.sub_(g_residual).sum(0)
    if targets is None:
        g_v = g_residual[0]
    else:
        values = ws("keys", torch.stack, [v] * N)  # in the place of the keys
        g_v = evaluate_backward(m1, m2, "u", slice(0, N), values, targets, g_residual).sum(0)
    g_logits, g_readout = gates_backward(system, gates, logs), None
    if generated is not None:
        g_vectors = torch.stack([g_k, g_v] if given.q is not None else [g_k, g_v, g_q[0]])
        g_x, g_x_gates, g_readout = generate_backward(m1, m2, given, generated, g_vectors, g_logits)
        g_k, g_v = g_x[0] + g_x_gates[0] + g_x_gates[1], g_x[1]  # both gates read the path of k
        g_q = g_q if given.q is not None else g_x[2:]
    before = WeightMatrix(m1.g_W, m1.g_S, m1.g_W_init), WeightMatrix(m2.g_W, m2.g_S, m2.g_W_init)
    return before, ChunkGradients(g_k, g_v, g_q[0], g_logits, g_readout)
