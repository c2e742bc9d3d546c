"""The way back through one chunk of the MLP memory; shapes and notation as in memory.py.

The gradients are by hand. Autograd would keep every intermediate, and add, expand and zero-fill gradients in
passes of their own; on a CPU these passes over memory are what a chunk costs. A gradient is called g_ and the
name of the tensor that it belongs to. Gradients to one tensor are added up inside the matrix products.

Gradients to decays and rates need no products of their own, by Euler's identity: where the loss L depends on
a number s through y = s·z alone, s ∂L/∂s = ⟨y, ∂L/∂y⟩. All of them enter as factors of reads, writes and
ends, so the gradient to the logarithm of a factor is the inner product of what it scales with the gradient to
that. `Logs` collects these products, `gates_backward` (chunk.py) draws them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.engines.chunked.memory import (
    ChunkGates,
    Evaluated,
    MatrixRead,
    WeightMatrix,
    Written,
    silu,
    through_hidden,
)
from nested_learning.memory.engines.chunked.scratch import Scratch


@dataclass
class Logs:
    """Gradients to the logarithms of decays and rates, as inner products of what they scale (Euler).

    With T_t and U_t the cumulative logs of the retentions and of the momentum decays: γ_t = exp(T_t),
    Γ_ts = exp(T_t − T_s), M_ts = exp(U_t − U_s).

    Attributes:
        read: [M, C] ⟨o_t − W_init x_t, g_o_t⟩, as this part of a read at t is scaled by exp(T_t).
        end_T, end_U: [M] ⟨W_C, g_W_C⟩ and ⟨S_C, g_S_C⟩, scaled by exp(T_C) and exp(U_C).
        written: [M, C] ⟨a_s, g_a_s⟩: a write at s is scaled by η_s and, without momentum, by exp(−T_s).
        decayed: [M, C] the same for exp(−T_s): `written`, but for memories with a pace of their own.
        erased: [M, C] that part of `written` which is an erase, scaled by exp(T_{t−1}).
        c, P: [M, C, 1] and [1, M, C, C] gradients to c_t and P_ts themselves, from reads; with momentum only,
            as the rest. P above the diagonal has no meaning.
        P_C, M_C, c_C: [M, C, 1] twice and [M, 1, 1] gradients to the last rows, from the end of the chunk.
        pace: [N, 1, 1, 1] by which T is multiplied in each memory, and so what it adds to end_T, decayed and
            erased; None: 1.
    """

    read: Tensor
    end_T: Tensor
    end_U: Tensor
    written: Tensor
    decayed: Tensor
    erased: Tensor
    c: Tensor
    P_C: Tensor
    M_C: Tensor
    c_C: Tensor
    P: Tensor | None = None
    pace: Tensor | None = None


@dataclass
class MatrixBackward:
    """One matrix on the way back through a chunk: the gradients to it, to its inputs and to its writes.

    Made from the gradients to the matrix after the chunk. First `end`, then `read`, then `write_backward` and
    `evaluate_backward` add what reaches each of them; then they are complete, g_W that to W before the chunk.

    Attributes:
        name: of its buffers.
        matrix: before the chunk.
        X: inputs [N, M, C, in].
        A: writes [N, M, C, out], before they are multiplied by `rate`.
        rate: [M, C, 1], [N, M, C, 1] or 1.
    """

    ws: Scratch
    gates: ChunkGates
    logs: Logs
    name: str
    matrix: WeightMatrix
    X: Tensor
    A: Tensor
    rate: Tensor | float
    g_W: Tensor
    g_S: Tensor | None
    g_W_init: Tensor | None
    g_X: Tensor = field(init=False)
    g_A: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.low_W = self.ws.low(f"W{self.name}", self.matrix.W)
        self.low_X = self.ws.low(f"X{self.name}", self.X)

    def end(self, after: WeightMatrix) -> None:
        """Through `end`, whose result was `after`.

        W_C = W_init + γ_C (W − W_init) + c_C S + Σ_s P_Cs a_s x_sᵀ and S_C = m_C S + Σ_s M_Cs a_s x_sᵀ.
        """
        ws, gates, logs, name = self.ws, self.gates, self.logs, self.name
        S, W_init, rate = self.matrix.S, self.matrix.W_init, self.rate
        gamma, P = gates.gamma[..., -1:, :], gates.P[..., -1, :].unsqueeze(-1)
        low, product = ws.low("g", self.g_W), ("product", self.g_W.shape)
        self.g_A = ws.bmm(self.low_X, low.mT, f"g_A{name}")  # not yet times P, as the next
        self.g_X = ws.bmm(self.A, low, f"g_X{name}")
        moved = after.W if W_init is None else ws(product, torch.sub, after.W, W_init)
        held = ws(product, torch.mul, moved, self.g_W)
        held = held.sum((0, 2, 3)) if logs.pace is None else (held.sum((2, 3)) * logs.pace[..., 0, 0]).sum(0)
        logs.end_T = logs.end_T + held
        if S is None or gates.momentum is None:
            self.g_A.mul_(P)
            self.g_X.mul_(P * rate)
        else:
            assert self.g_S is not None and after.S is not None  # noqa: PT018
            _, Mu, m, c = gates.momentum
            M, low = Mu[:, -1].unsqueeze(-1), ws.low("g", self.g_S)
            through_S = ws.bmm(self.A, low, ("S x", S.shape))
            logs.P_C = logs.P_C + ws.dot(self.X, self.g_X).sum(0) * rate  # ⟨a_s, g_W x_s⟩
            logs.M_C = logs.M_C + ws.dot(self.X, through_S).sum(0) * rate
            logs.c_C = logs.c_C + ws(product, torch.mul, S, self.g_W).sum((0, 2, 3)).view(-1, 1, 1)
            logs.end_U = logs.end_U + ws(product, torch.mul, after.S, self.g_S).sum((0, 2, 3))
            self.g_A.mul_(P).addcmul_(ws.bmm(self.low_X, low.mT, ("S A", S.shape)), M)
            self.g_X.mul_(P * rate).addcmul_(through_S, M * rate)
            self.g_S = ws(f"g_S{name}", torch.mul, self.g_S, m[:, -1:]).addcmul_(self.g_W, c[:, -1:])
        if self.g_W_init is not None:
            self.g_W_init = ws(f"g_W_init{name}", torch.addcmul, self.g_W_init, self.g_W, 1 - gamma)
        # From the second chunk on g_W is this buffer already, and scaled in place; g_S and g_W_init likewise.
        self.g_W = ws(f"g_W{name}", torch.mul, self.g_W, gamma)

    def read(self, gates: ChunkGates, x: Tensor, kept: MatrixRead, g_o: Tensor) -> Tensor:
        """Through `read`, of the last memory with its gates: the gradient to the queries x [1, M, C, in].

        o = γ (W − W_init) x + W_init x + c S x + (raw ⊙ P) A with raw = x Xᵀ.
        """
        ws, logs, at = self.ws, self.logs, slice(len(self.X) - 1, len(self.X))
        rate = gates.eta if isinstance(self.rate, Tensor) else self.rate
        W, S, W_init = (None if t is None else t[at] for t in self.matrix)
        assert W is not None
        moved = kept.o if kept.start is None else ws("moved", torch.sub, kept.o, kept.start)
        logs.read = logs.read + ws.dot(moved, g_o).sum((0, 3))
        scores = ws("scores", torch.mul, kept.raw, gates.P)
        self.g_A = ws.add_bmm(self.g_A, scores.mT, g_o, at=at)
        g_scores = ws.bmm(g_o, (self.A[at] * rate).mT, "g_scores")
        if S is not None:  # g_P += g_scores ⊙ raw
            terms = (g_scores, kept.raw) if logs.P is None else (logs.P, g_scores, kept.raw)
            logs.P = ws("g_P", torch.mul if logs.P is None else torch.addcmul, *terms)
        g_scores.mul_(gates.P)  # from here on the gradient to raw
        self.g_X = ws.add_bmm(self.g_X, g_scores.mT, x, at=at)

        left = g_o * gates.gamma
        self.g_W = ws.add_bmm(self.g_W, left.mT, x, at=at)
        g_x = ws.add_bmm(ws.bmm(left, W), g_scores, self.X[at])
        if W_init is not None:
            assert self.g_W_init is not None
            rest = g_o - left
            self.g_W_init = ws.add_bmm(self.g_W_init, rest.mT, x, at=at)
            g_x = ws.add_bmm(g_x, rest, W_init)
        if S is not None and gates.momentum is not None:
            assert self.g_S is not None
            self.g_S = ws.add_bmm(self.g_S, (g_o * gates.momentum.c).mT, x, at=at)
            through_S = ws.bmm(g_o, S, ("S x", S.shape))
            logs.c = logs.c + ws.dot(through_S, x)[0]
            g_x.addcmul_(through_S, gates.momentum.c)
        return g_x


def evaluate_backward(
    m1: MatrixBackward, m2: MatrixBackward, name: str, at: slice, x: Tensor, kept: Evaluated, g_y: Tensor
) -> Tensor:
    """Through `evaluate` of the memories `at`: the gradient to x, in the place of that to y.

    Overwrites the buffers `name` and "g_z `name`".
    """
    ws = m1.ws
    # y = r / max(‖r‖, 1), r = x + W1 u: the part along y is lost where r was longer
    along = ws.dot(kept.y, g_y).mul_(kept.f_y < 1)
    g_r = g_y.addcmul_(kept.y, along, value=-1).mul_(kept.f_y)
    low = ws.low(f"g_r {name}", g_r)
    u = ws(name, silu, kept.z).mul_(kept.f)
    m1.g_W = ws.add_bmm(m1.g_W, low.mT, u, at=at)
    g_u = ws.bmm(low, m1.low_W[at], f"g_z {name}")
    g_z, _ = through_hidden(ws, f"g_z {name}", g_u, u, kept.z, kept.f)
    low = ws.low(f"g_z {name}", g_z)
    m2.g_W = ws.add_bmm(m2.g_W, low.mT, x, at=at)
    return ws.add_bmm(g_r, low, m2.low_W[at])


class Slopes(NamedTuple):
    """The hidden layer at the keys again, with its derivatives; buffers, [N, M, C, e]."""

    u: Tensor
    first: Tensor  # silu′(z)
    second: Tensor  # silu″(z)
    across: Tensor  # g − u ⟨u, g⟩
    direction: Tensor  # clip · gradient: the writes of W2 before the rate


def slopes(ws: Scratch, kept: Written) -> Slopes:
    """The buffers of `write` again, from what it kept."""
    z, f = kept.z, kept.f
    s = ws("silu'", torch.sigmoid, z)
    h = ws("h", torch.mul, z, s)
    u = ws("u", torch.mul, h, f)
    slope = ws("silu''", torch.addcmul, s, s, s, value=-1)  # s (1 − s)
    h.addcmul_(h, s, value=-1)  # z s (1 − s)
    second = slope.mul_(2).add_(h).addcmul_(h, s, value=-2)  # s (1 − s) (2 + z (1 − 2 s))
    first = s.add_(h)  # s + z s (1 − s)
    across = ws("g_z u", torch.addcmul, kept.g, u, kept.along, value=-1)
    direction = ws("direction", torch.mul, across, first).mul_(f * kept.clip)
    return Slopes(u, first, second, across, direction)


def write_backward(
    m1: MatrixBackward, m2: MatrixBackward, kept: Written, at_key: Slopes, residual: Tensor | None
) -> Tensor:
    """Through `write`: the gradient to the residual v̂ − k, in the place of that to W1's writes.

    Long: one derivation, of which every line needs those above it.

    Args:
        residual: as `write` took it, for the delta rule; None for gradient descent.
    """
    ws, gates, logs = m1.ws, m1.gates, m1.logs
    u, first, second, across, direction = at_key
    eta, clip, along = gates.eta, kept.clip, kept.along

    # The writes of W1: (I + E) A = η (residual − γ_{t−1} answer), E = erased ⊙ u uᵀ; by gradient descent
    # E = 0 and γ_{t−1} = 1. With g_right = (I + E)⁻ᵀ g_A the gradient to E is −g_right Aᵀ.
    g_right = m1.g_A
    if kept.inverse is not None and gates.erased is not None:
        g_right = ws("g_right", torch.matmul, kept.inverse.mT, m1.g_A)
        g_gram = ws.bmm(g_right, kept.A.mT, "g_gram").mul_(gates.erased)
        both = ws("g_gram both", torch.add, g_gram, g_gram.mT)  # u stands on both sides of u uᵀ
        m1.g_X = ws.add_bmm(m1.g_X, both, m1.low_X, alpha=-1)
    product, pace = ws.dot(g_right, kept.A), logs.pace
    written = product.sum(0)
    g_residual = g_right.mul_(eta)
    if residual is not None:  # A_t = η residual_t − erase
        of_residual = ws.dot(g_residual, residual)
        erased = written - of_residual.sum(0) if pace is None else ((product - of_residual) * pace).sum(0)
        logs.erased = erased.squeeze(-1)

    # The writes of W2: A2 = η clip r with r = σ′(z) f (g − u ⟨u, g⟩), clip = 1 / max(‖r‖, 1).
    dot = ws.dot(direction, m2.g_A)
    if pace is None:
        logs.written = logs.decayed = (written + dot.sum(0) * eta).squeeze(-1)
    else:
        product = product + dot * eta
        logs.written, logs.decayed = product.sum(0).squeeze(-1), (product * pace).sum(0).squeeze(-1)
    g_r = m2.g_A.addcmul_(direction, dot.mul_(clip < 1), value=-1).mul_(clip * eta)
    # r depends on z through σ′(z), on g, on u and on f. With p = g_r σ′(z) f the gradients are
    #   z: g_r f across σ″(z)         g: p − u ⟨u, p⟩
    #   f: ⟨p, across⟩ / f            u: −p ⟨u, g⟩ − g ⟨u, p⟩
    through_first = across.mul_(g_r).mul_(second)  # in the place of across; f is multiplied below
    p = g_r.mul_(first).mul_(kept.f)  # in the place of g_r, which was that of g_A2
    along_p = ws.dot(u, p)
    p_g = ws.dot(p, kept.g)
    g_g = ws("silu''", torch.addcmul, p, u, along_p, value=-1)  # in the place of `second`

    # g = W1ᵀ error, error = residual − answer, answer = W1 u.
    low = ws.low("g_g", g_g)
    m1.g_W = ws.add_bmm(m1.g_W, kept.error.mT, low)
    g_error = ws.bmm(low, m1.low_W.mT, "g_error")
    if residual is None:
        g_answer = g_residual.add_(g_error)  # minus the gradient to the answer
    else:
        assert gates.before is not None
        g_answer = ws("residual", torch.addcmul, g_error, g_residual, gates.before)
        g_residual.add_(g_error)
    low = ws.low("g_answer", g_answer)
    m1.g_W = ws.add_bmm(m1.g_W, low.mT, m1.low_X, alpha=-1)
    g_u = m1.g_X = ws.add_bmm(m1.g_X, low, m1.low_W, alpha=-1)

    # u = f h, h = σ(z), ∂f/∂h = −f² u: with G the whole gradient to u, that to h is
    #   f (G − u ⟨u, G⟩) − f² u ⟨p, across⟩ / f = f (G − u (⟨u, G⟩ + ⟨p, g⟩ − ⟨u, g⟩ ⟨u, p⟩)),
    # and as G = g_u − p ⟨u, g⟩ − g ⟨u, p⟩, the factor of u is ⟨u, g_u⟩ + ⟨p, g⟩ − 3 ⟨u, g⟩ ⟨u, p⟩.
    dot = p_g.addcmul_(along, along_p, value=-3).add_(ws.dot(u, g_u))
    g_u.addcmul_(p, along, value=-1).addcmul_(kept.g, along_p, value=-1).addcmul_(u, dot, value=-1)
    g_z = through_first.addcmul_(g_u, first).mul_(kept.f)

    # z = W2 k.
    low = ws.low("g_z", g_z)
    m2.g_W = ws.add_bmm(m2.g_W, low.mT, m2.low_X)
    m2.g_X = ws.add_bmm(m2.g_X, low, m2.low_W)
    return g_residual
