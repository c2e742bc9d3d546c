"""One chunk of self-modifying Titans, forward and backward by hand: the arithmetic behind self_modifying.py.

Shapes: N memories (the last is read out), M = B·H rows, C tokens, d head width, e hidden width. The
memory axis comes first, so that the generating memories, and the one that is read out, are contiguous
slices. Notation as in `ops/delta_rule`: gamma_t is the product of the retentions up to token t.

Why by hand: autograd would keep every intermediate and add, expand and zero-fill gradients in passes of
their own, and on a CPU these passes over memory are what a chunk costs. Two things make them few here:

- Gradients to one tensor are accumulated inside the matrix products (`Scratch.add_bmm`).
- Retentions and learning rates enter as products along the chunk, so that their gradients follow from
  Euler's identity for homogeneous functions. A write B_s is scaled by everything after s, hence the sum
  of x ∂L/∂x over all decay factors x that scale it is ⟨B_s, ∂L/∂B_s⟩; no [C, C] gradient is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.fused.scratch import LOG_FLOOR, Scratch, hidden, silu_backward_
from nested_learning.ops.delta_rule.triangular import inverse_unit_lower


class Memories(NamedTuple):
    """The weights at the start of a chunk, and what retention pulls W2 towards."""

    W1: Tensor  # [N, M, d, e]
    W2: Tensor  # [N, M, e, d]
    W2_init: Tensor  # [N, M, e, d]


@dataclass(frozen=True)
class Layout:
    """Which memory does what.

    Attributes:
        vectors: how many memories generate k, v and q: the first ones.
        gates: how many generate gates: the next ones, eta before alpha.
        chunk_size: C.
        eta_max: upper bound of the learning rate.
    """

    vectors: int
    gates: int
    chunk_size: int
    eta_max: float

    @property
    def adaptive_q(self) -> bool:
        return self.vectors == 3

    @property
    def generating(self) -> int:
        return self.vectors + self.gates


class Generated(NamedTuple):
    """The signals of a chunk and what their gradient needs."""

    z: Tensor  # [G, M, C, e] hidden pre-activations of the G generating memories
    f: Tensor  # [G, M, C, 1] inverse norms of the hidden vectors
    vectors: Tensor  # [V, M, C, d] k, v and, with adaptive q, q; norm at most 1
    f_out: Tensor  # [V, M, C, 1] their inverse norms before
    folded: Tensor  # [2, M, 1, e] W1ᵀ w of the gates' memories
    sigmoids: Tensor  # [2, M, C] of the gates' logits; the retention's is alpha
    eta: Tensor  # [M, C, 1]
    since_start: Tensor  # the fields of `Decays`
    before_start: Tensor
    between: Tensor
    clamped: Tensor

    @property
    def decay(self) -> Decays:
        return Decays(self.since_start, self.before_start, self.between, self.clamped)


class Written(NamedTuple):
    """The writes of a chunk and what their gradient needs."""

    z_k: Tensor  # [N, M, C, e] W2 k
    f_k: Tensor  # [N, M, C, 1]
    z_v: Tensor  # [N, M, C, e] W2 v
    f_v: Tensor  # [N, M, C, 1]
    target: Tensor  # [N, M, C, d] M(v), its norm at most 1
    f_t: Tensor  # [N, M, C, 1]
    answer: Tensor  # [N, M, C, d] W1 u(k)
    g: Tensor  # [N, M, C, e] W1ᵀ (target − k − answer)
    along: Tensor  # [N, M, C, 1] ⟨u, g⟩
    clip: Tensor  # [N, M, C, 1] factor that limits the gradient of W2
    inverse: Tensor  # [N, M, C, C] of the triangular system
    B: Tensor  # [N, M, C, d] writes of W1


class Read(NamedTuple):
    """The read-out of a chunk and what its gradient needs."""

    moved: Tensor  # [M, C, e] (W2_t − W2_init) q
    z: Tensor  # [M, C, e] W2_t q
    f: Tensor  # [M, C, 1]
    out: Tensor  # [M, C, d] y − q


class Decays(NamedTuple):
    """Products of the retentions of a chunk, as `ops.delta_rule.chunk.Decay` has them."""

    since_start: Tensor  # [M, C, 1] gamma_t
    before_start: Tensor  # [M, C, 1] gamma_{t-1}
    between: Tensor  # [M, C, C] gamma_t / gamma_s for s <= t, else 0
    clamped: Tensor  # [M, C] where the log of the retention is below the floor, and has no gradient

    def erased(self, ws: Scratch, eta: Tensor) -> Tensor:
        """[M, C, C] eta_t gamma_{t-1} / gamma_s for s < t, else 0: the part of write s that t erases."""
        rate = ws("erased", self.between.shape)
        rate[:, 0].zero_()
        torch.mul(eta[:, 1:], self.between[:, :-1], out=rate[:, 1:])
        return rate

    @property
    def to_end(self) -> Tensor:
        """[M, C, 1] gamma_C / gamma_s."""
        return self.between[:, -1].unsqueeze(-1)

    @property
    def whole(self) -> Tensor:
        """[M, 1, 1] gamma_C."""
        return self.since_start[:, -1:]


def decays(log_alpha: Tensor) -> Decays:
    """The products of retentions of a chunk, log_alpha [M, C]."""
    log = log_alpha.clamp_min(LOG_FLOOR).unsqueeze(-1)
    total = log.cumsum(-2)
    # above the diagonal the exponential may overflow: those entries are set, not multiplied, to zero
    between = (total - total.mT).exp_().tril_()
    return Decays(total.exp(), (total - log).exp_(), between, log_alpha < LOG_FLOOR)


def _bounded_(x: Tensor) -> tuple[Tensor, Tensor]:
    f = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    return x.mul_(f), f


def unbound_(ws: Scratch, g: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """The gradient through y = x / max(‖x‖, 1), in g's place; f = 1 where x was left alone."""
    return g.addcmul_(y, ws.rows_dot(y, g).mul_(f < 1), value=-1).mul_(f)


def generate(ws: Scratch, layout: Layout, W: Memories, x: Tensor, readout: Tensor, bias: Tensor) -> Generated:
    """The signals of a chunk.

    Args:
        x: [G, M, C, d] input of each generating memory.
        readout: [2, M, 1, d], bias [2, M, 1]: what reads the gates from their memories' outputs.

    A gate needs ⟨w, x + W1 u⟩ alone, which is ⟨w, x⟩ + ⟨W1ᵀ w, u⟩: no product over the tokens.
    """
    V, G = layout.vectors, layout.generating
    z = ws.bmm(x, W.W2[:G].mT)
    u, f = hidden(ws, "u generated", z)
    vectors, f_out = _bounded_(ws.add_bmm(x[:V].clone(), u[:V], W.W1[:V].mT))
    folded = (W.W1[V:G] * readout.mT).sum(-2, keepdim=True)
    logits = ws.rows_dot(x[V:], readout).add_(ws.rows_dot(u[V:], folded)).squeeze(-1).add_(bias)
    sigmoids = torch.sigmoid(logits)
    eta = (layout.eta_max * sigmoids[0]).unsqueeze(-1)
    return Generated(z, f, vectors, f_out, folded, sigmoids, eta, *decays(F.logsigmoid(logits[1])))


def write(
    ws: Scratch, W: Memories, k: Tensor, v: Tensor, eta: Tensor, decay: Decays
) -> tuple[Written, Tensor, Tensor]:
    """The writes of a chunk: what is kept, the hidden keys u and the writes of W2 [N, M, C, e]."""
    N = W.W1.shape[0]
    W1, W2 = ws.low("W1", W.W1), ws.low("W2", W.W2)
    z_k = ws.bmm(ws.repeat("keys", ws.low("k", k), N), W2.mT)
    u, f_k = hidden(ws, "u", z_k)
    u_low = ws.low("u", u)
    values = v.repeat(N, 1, 1, 1)
    z_v = ws.bmm(values, W2.mT)
    u_v, f_v = hidden(ws, "u_v", z_v)
    target, f_t = _bounded_(ws.add_bmm(values, u_v, W1.mT))
    answer = ws.bmm(u_low, W1.mT)
    residual = torch.sub(target, k, out=ws("residual", target.shape))
    g = ws.bmm(torch.sub(residual, answer, out=ws("error", target.shape)), W1)
    along = ws.rows_dot(u, g)
    gradient = torch.addcmul(g, u, along, value=-1, out=ws("gradient", g.shape)).mul_(f_k)
    gradient = silu_backward_(gradient, z_k)
    clip = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    inverse = inverse_unit_lower(ws.named_bmm("system", u_low, u_low.mT).mul_(decay.erased(ws, eta)))
    right = residual.addcmul_(decay.before_start, answer, value=-1).mul_(eta)
    B = torch.matmul(inverse, right)  # the solve stays in full precision
    kept = Written(z_k, f_k, z_v, f_v, target, f_t, answer, g, along, clip, inverse, B)
    return kept, u, gradient.mul_(eta * clip)


def read(
    ws: Scratch, W: Memories, q: Tensor, k: Tensor, u: Tensor, a: Tensor, B: Tensor, decay: Decays
) -> Read:
    """The read-out of the last memory after each token's write, from its u, a [M, C, e] and B [M, C, d]."""
    W1, W2, W2_init = (w[-1] for w in W)
    q_low = ws.low("q", q)
    moved = ws.bmm(q_low, (W2 - W2_init).mT).mul_(decay.since_start)
    ws.add_bmm(moved, ws.bmm(q_low, k.mT).mul_(decay.between), a)
    z = ws.add_bmm(moved.clone(), q_low, W2_init.mT)
    u_q, f = hidden(ws, "u_q", z)
    u_low = ws.low("u_q", u_q)
    out = ws.bmm(u_low, W1.mT).mul_(decay.since_start)
    ws.add_bmm(out, ws.bmm(u_low, u.mT).mul_(decay.between), B)
    return Read(moved, z, f, out)


def finish(ws: Scratch, W: Memories, k: Tensor, u: Tensor, a: Tensor, B: Tensor, decay: Decays) -> Memories:
    """The weights after the chunk; overwrites u."""
    W1 = ws.add_bmm(W.W1 * decay.whole, B.mT, u.mul_(decay.to_end))
    keys = ws.repeat("keys", ws.low("k", k * decay.to_end), a.shape[0])
    W2 = ws.add_bmm(torch.lerp(W.W2_init, W.W2, decay.whole), a.mT, keys)
    return Memories(W1, W2, W.W2_init)
