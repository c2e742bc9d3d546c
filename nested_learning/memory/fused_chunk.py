"""One chunk of self-modifying Titans, forward and backward by hand: the arithmetic behind fused.py.

Shapes: N memories (the last is read out), M = B·H rows, C tokens, d head width, e hidden width. The
memory axis comes first, so that the generating memories, and the one that is read out, are contiguous
slices. Notation as in `ops/delta_rule`: gamma_t is the product of the retentions up to token t.

Why by hand: autograd would keep every intermediate and add, expand and zero-fill gradients in passes of
their own, and on a CPU these passes over memory are what a chunk costs. Two things make them few here:

- Gradients to one tensor are accumulated inside the matrix products (`accumulate`).
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

from nested_learning.ops.delta_rule.chunk import Decay
from nested_learning.ops.delta_rule.triangular import inverse_unit_lower
from nested_learning.ops.mlp_memory import HIDDEN_FLOOR

UNIT_FLOOR = 1e-3  # that of ops.norm.unit
LOG_FLOOR = -80.0  # that of ops.delta_rule.chunk.Decay


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
    vectors: Tensor  # [V, M, C, d] k, v and, with adaptive q, q; unit-norm
    f_out: Tensor  # [V, M, C, 1] their inverse norms before
    sigmoids: Tensor  # [2, M, C] of the gates' logits; the retention's is alpha
    eta: Tensor  # [M, C, 1]
    log_alpha: Tensor  # [M, C]
    clamped: Tensor  # [M, C] where log_alpha is below the floor of `Decay`


class Written(NamedTuple):
    """The writes of a chunk and what their gradient needs."""

    z_k: Tensor  # [N, M, C, e] W2 k
    f_k: Tensor  # [N, M, C, 1]
    z_v: Tensor  # [N, M, C, e] W2 v
    f_v: Tensor  # [N, M, C, 1]
    target: Tensor  # [N, M, C, d] unit(M(v))
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
    since_start: Tensor  # [M, C, 1]
    before_start: Tensor  # [M, C, 1]
    between: Tensor  # [M, C, C]
    before: Tensor  # [M, C, C]
    to_end: Tensor  # [M, C, 1] last row of `between`
    whole: Tensor  # [M, 1, 1] of the whole chunk


def decays(log_alpha: Tensor) -> Decays:
    """The products of retentions of a chunk, log_alpha [M, C]."""
    d = Decay(log_alpha)
    since_start = d.since_start.unsqueeze(-1)
    return Decays(
        since_start,
        d.before_start.unsqueeze(-1),
        d.between,
        d.before,
        d.between[:, -1].unsqueeze(-1),
        since_start[:, -1:],
    )


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over the two leading dimensions."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """out += alpha a @ b, the sum taken inside the product."""
    out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=alpha)
    return out


def rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ along the last dimension, kept."""
    return (a * b).sum(-1, keepdim=True)


def _inverse_norm(x: Tensor, floor: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().add_(floor**2).rsqrt_()


def _hidden(z: Tensor) -> tuple[Tensor, Tensor]:
    """u = n(silu(z)) and the factor f of n."""
    h = F.silu(z)
    f = _inverse_norm(h, HIDDEN_FLOOR)
    return h.mul_(f), f


def _unit_(x: Tensor) -> tuple[Tensor, Tensor]:
    f = _inverse_norm(x, UNIT_FLOOR)
    return x.mul_(f), f


def unscale_(g: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """The gradient through y = x f(‖x‖): f (g − y ⟨y, g⟩), in g's place."""
    return g.addcmul_(y, rows_dot(y, g), value=-1).mul_(f)


def silu_backward(g: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(g, z)


def generate(layout: Layout, W: Memories, x: Tensor, readout: Tensor, bias: Tensor) -> Generated:
    """The signals of a chunk.

    Args:
        x: [G, M, C, d] input of each generating memory.
        readout: [2, M, d, 1], bias [2, M, 1]: what reads the gates from their memories' outputs.

    A gate needs ⟨w, x + W1 u⟩ alone, which is ⟨w, x⟩ + ⟨W1ᵀ w, u⟩: no product over the tokens.
    """
    V, G = layout.vectors, layout.generating
    z = bmm(x, W.W2[:G].mT)
    u, f = _hidden(z)
    out = torch.baddbmm(x[:V].flatten(0, 1), u[:V].flatten(0, 1), W.W1[:V].flatten(0, 1).mT)
    vectors, f_out = _unit_(out.view(x[:V].shape))
    logits = bmm(x[V:], readout)
    accumulate(logits, u[V:], bmm(W.W1[V:G].mT, readout))
    logits = logits.squeeze(-1) + bias
    sigmoids = torch.sigmoid(logits)
    eta, log_alpha = (layout.eta_max * sigmoids[0]).unsqueeze(-1), F.logsigmoid(logits[1])
    return Generated(z, f, vectors, f_out, sigmoids, eta, log_alpha, log_alpha < LOG_FLOOR)


def write(W: Memories, k: Tensor, v: Tensor, eta: Tensor, decay: Decays) -> tuple[Written, Tensor, Tensor]:
    """The writes of a chunk: what is kept, then the hidden keys u [N, M, C, e] and the writes of W2, alike."""
    N = W.W1.shape[0]
    keys, values = k.expand(N, *k.shape).contiguous(), v.expand(N, *v.shape).contiguous()
    z_k = bmm(keys, W.W2.mT)
    u, f_k = _hidden(z_k)
    z_v = bmm(values, W.W2.mT)
    u_v, f_v = _hidden(z_v)
    target, f_t = _unit_(accumulate(values, u_v, W.W1.mT))
    answer = bmm(u, W.W1.mT)
    residual = target - k
    g = bmm(residual - answer, W.W1)
    along = rows_dot(u, g)
    gradient = silu_backward(torch.addcmul(g, u, along, value=-1).mul_(f_k), z_k)
    clip = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    system = bmm(u, u.mT).mul_(eta * decay.before)
    inverse = inverse_unit_lower(system)
    right = residual.addcmul_(decay.before_start, answer, value=-1).mul_(eta)
    B = bmm(inverse, right)
    kept = Written(z_k, f_k, z_v, f_v, target, f_t, answer, g, along, clip, inverse, B)
    return kept, u, gradient.mul_(eta * clip)


def read(W: Memories, q: Tensor, k: Tensor, u: Tensor, a: Tensor, B: Tensor, decay: Decays) -> Read:
    """The read-out of the last memory after each token's write: q, k [M, C, d], u, a [M, C, e], B [M, C, d]."""
    W1, W2, W2_init = (w[-1] for w in W)
    moved = torch.bmm(q, (W2 - W2_init).mT).mul_(decay.since_start)
    moved.baddbmm_(torch.bmm(q, k.mT).mul_(decay.between), a)
    z = torch.baddbmm(moved, q, W2_init.mT)
    u_q, f = _hidden(z)
    out = torch.bmm(u_q, W1.mT).mul_(decay.since_start)
    out.baddbmm_(torch.bmm(u_q, u.mT).mul_(decay.between), B)
    return Read(moved, z, f, out)


def finish(W: Memories, k: Tensor, u: Tensor, a: Tensor, B: Tensor, decay: Decays) -> Memories:
    """The weights after the chunk."""
    W1 = accumulate(W.W1 * decay.whole, B.mT, u * decay.to_end)
    keys = (k * decay.to_end).expand(a.shape[0], *k.shape).contiguous()
    W2 = accumulate(torch.lerp(W.W2_init, W.W2, decay.whole), a.mT, keys)
    return Memories(W1, W2, W.W2_init)
