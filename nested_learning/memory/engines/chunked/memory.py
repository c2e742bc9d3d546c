"""The MLP memory M(x) = x + W1 n(σ(W2 x)) (eq 89) over one chunk: its writes and its reads.

Shapes: N memories, of which the last is read out, M = batch · heads rows, C tokens, d head width, e hidden
width. Notation as in `ops/delta_rule/README.md`. Of each matrix W [N, M, out, in] the chunk knows the inputs
X [N, M, C, in] and the writes A [N, M, C, out] of its tokens, and W_t follows from them:

    W_t = W_init + γ_t (W_0 − W_init) + c_t S_0 + Σ_{s≤t} P_ts a_s x_sᵀ     (without momentum S = 0, P = Γ).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.engines.chunked.scratch import Scratch
from nested_learning.ops.delta_rule.triangular import inverse_unit_lower
from nested_learning.ops.mlp_memory import HIDDEN_FLOOR

silu = torch.ops.aten.silu


class WeightMatrix(NamedTuple):
    """One weight matrix of all memories at a boundary, or the gradients to it."""

    W: Tensor  # [N, M, out, in]
    S: Tensor | None = None  # momentum
    W_init: Tensor | None = None  # what retention pulls W towards, None: zero


class Momentum(NamedTuple):
    """Decays of a chunk with momentum: m_t is the product of the μ_s up to t, M_ts that from s to t."""

    Gamma: Tensor  # [M, C, C] Γ
    Mu: Tensor  # [M, C, C] M
    m: Tensor  # [M, C, 1]
    c: Tensor  # [M, C, 1] Σ_{r≤t} Γ_tr m_r: what W_t holds of the momentum before the chunk


class ChunkGates(NamedTuple):
    """Rates and decays of a chunk: γ_t is the product of the retentions up to t, Γ_ts that since s.

    Where the generating memories have a pace of their own, without momentum, all from `eta` on have the
    memories in front: [N, M, ...].
    """

    sigmoids: Tensor  # [2 or 3, M, C] of the logits of eta, alpha and mu
    clamped: Tensor  # [1 or 2, M, C] where a decay's log is below the floor: no gradient
    eta: Tensor  # [M, C, 1] η_t
    gamma: Tensor  # [M, C, 1] γ_t
    P: Tensor  # [M, C, C] Γ M, without momentum Γ: what W_t holds of the write at s
    momentum: Momentum | None
    before: Tensor | None  # [M, C, 1] γ_{t−1}, for the delta rule
    erased: Tensor | None  # [M, C, C] η_t Γ_{t−1,s} for s < t, else 0: what t erases of write s

    def of_last(self) -> ChunkGates:
        """Those of the memory that is read out, out of [N, M, ...]."""
        assert self.before is not None and self.erased is not None  # noqa: PT018
        return self._replace(
            eta=self.eta[-1],
            gamma=self.gamma[-1],
            P=self.P[-1],
            before=self.before[-1],
            erased=self.erased[-1],
        )


class Evaluated(NamedTuple):
    """Answers of n memories, bounded to norm 1, and tensors that their gradient needs."""

    y: Tensor  # [n, M, C, d]
    f_y: Tensor  # [n, M, C, 1] their inverse norms before, at most 1
    z: Tensor  # [n, M, C, e] W2 x
    f: Tensor  # [n, M, C, 1] factor of n


class Written(NamedTuple):
    """The gradients at the anchor of a chunk's tokens (eq 88), and tensors that their own gradient needs."""

    z: Tensor  # [N, M, C, e] W2 k
    f: Tensor  # [N, M, C, 1] factor of n
    error: Tensor  # [N, M, C, d] v̂ − M(k)
    g: Tensor  # [N, M, C, e] W1ᵀ error
    along: Tensor  # [N, M, C, 1] ⟨u, g⟩
    clip: Tensor  # [N, M, C, 1] factor that bounds the gradient of W2 to norm 1
    A: Tensor  # [N, M, C, d] writes of W1
    inverse: Tensor | None  # [N, M, C, C] of the delta rule's triangular system


class MatrixRead(NamedTuple):
    """The answer of one matrix to the queries, and tensors that its gradient needs."""

    o: Tensor  # [1, M, C, out] W_t x_t
    start: Tensor | None  # [1, M, C, out] W_init x_t
    raw: Tensor  # [1, M, C, C] ⟨x_t, x_s⟩ of queries and keys


# --- the hidden layer u = n(σ(z)) = f σ(z), f = 1 / sqrt(‖σ(z)‖² + floor²)


def hidden(ws: Scratch, name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """u [..., e], in the buffer `name`, and f [..., 1]."""
    h = ws(name, silu, z)
    f = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().add_(HIDDEN_FLOOR**2).rsqrt_()
    return h.mul_(f), f


def through_hidden(
    ws: Scratch, name: str, g: Tensor, u: Tensor, z: Tensor, f: Tensor
) -> tuple[Tensor, Tensor]:
    """From g = ∂L/∂u: ∂L/∂z = σ′(z) f (g − u ⟨u, g⟩), in the buffer `name`, and ⟨u, g⟩.

    n changes no length, so what of g lies along u is lost.
    """
    along = ws.dot(u, g)
    across = ws(name, torch.addcmul, g, u, along, value=-1).mul_(f)
    return ws(name, silu_backward, across, z), along


def silu_backward(g: Tensor, z: Tensor, out: Tensor | None = None) -> Tensor:
    """g silu′(z)."""
    if out is None:
        return torch.ops.aten.silu_backward(g, z)
    return torch.ops.aten.silu_backward.grad_input(g, z, grad_input=out)


# --- whole memories at the anchor


def evaluate(ws: Scratch, name: str, W1: Tensor, W2: Tensor, x: Tensor) -> Evaluated:
    """M(x), scaled down to norm 1 where it is longer: what a memory generates (eq 86), its target (eq 87).

    In the place of x; the hidden vectors are in the buffer `name`.
    """
    z = ws.bmm(x, W2.mT)
    u, f = hidden(ws, name, z)
    y = ws.add_bmm(x, u, W1.mT)
    f_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    return Evaluated(y.mul_(f_y), f_y, z, f)


def write(
    ws: Scratch, gates: ChunkGates, W1: Tensor, W2: Tensor, keys: Tensor, residual: Tensor, delta: bool
) -> tuple[Written, Tensor, Tensor]:
    """The writes of a chunk (eq 88): what is kept, the inputs u of W1 and the writes of W2 (both in buffers).

    Args:
        W1, W2: the anchors.
        keys: [N, M, C, d] k, the inputs of W2.
        residual: [N, M, C, d] v̂ − k, what W1 u is to answer; overwritten.
        delta: W1 by DGD (eq 57): it erases its answer and writes the residual. Else by gradient descent.
    """
    low1 = ws.low("W1", W1)
    z = ws.bmm(keys, ws.low("W2", W2).mT)
    u, f = hidden(ws, "u", z)
    low = ws.low("u", u)
    # error: minus the gradient of ½‖M(k) − v̂‖² at the output
    if delta:
        answer = ws.bmm(low, low1.mT, "answer")
        error = torch.sub(residual, answer)
    else:
        error = ws.add_bmm(residual, low, low1.mT, alpha=-1)
    g = ws.bmm(error, low1)
    gradient, along = through_hidden(ws, "A2", g, u, z, f)
    clip = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    if delta:
        # b_t = η_t (residual_t − W1_{t−1} u_t), and W1_{t−1} = γ_{t−1} W1 + Σ_{s<t} Γ_{t−1,s} b_s u_sᵀ
        assert gates.before is not None and gates.erased is not None  # noqa: PT018
        system = ws.bmm(low, low.mT, "system").mul_(gates.erased)
        inverse = inverse_unit_lower(system)
        right = residual.addcmul_(gates.before, answer, value=-1).mul_(gates.eta)
        A = torch.matmul(inverse, right)  # the solve stays in full precision
    else:
        inverse, A = None, error * gates.eta
    return Written(z, f, error, g, along, clip, A, inverse), u, gradient.mul_(gates.eta * clip)


def read(ws: Scratch, gates: ChunkGates, matrix: WeightMatrix, x: Tensor, X: Tensor, A: Tensor) -> MatrixRead:
    """o_t = W_t x_t after each token's write, of the last memory; x [1, M, C, in]."""
    W, S, W_init = (None if t is None else t[-1:] for t in matrix)
    assert W is not None
    low = ws.low("x", x)
    raw = ws.bmm(low, X[-1:].mT)
    o = ws.bmm(low, W.mT)
    start = None if W_init is None else ws.bmm(low, W_init.mT)
    if start is None:
        o.mul_(gates.gamma)
    else:  # γ W x + (1 − γ) W_init x
        o.lerp_(start, 1 - gates.gamma)
    if S is not None and gates.momentum is not None:
        o.addcmul_(ws.bmm(low, S.mT, ("S x", S.shape)), gates.momentum.c)
    return MatrixRead(ws.add_bmm(o, ws("scores", torch.mul, raw, gates.P), A[-1:]), start, raw)


def end(
    ws: Scratch, gates: ChunkGates, matrix: WeightMatrix, name: str, X: Tensor, A: Tensor
) -> WeightMatrix:
    """The matrix and its momentum after the chunk. Overwrites the buffer `name`, where X may be."""
    W, S, W_init = matrix
    gamma, P = gates.gamma[..., -1:, :], gates.P[..., -1, :].unsqueeze(-1)  # [M, 1, 1] γ_C, [M, C, 1] P_C
    after = W * gamma if W_init is None else torch.lerp(W_init, W, gamma)
    if S is not None and gates.momentum is not None:
        _, Mu, m, c = gates.momentum
        after.addcmul_(S, c[:, -1:])
        held = ws(f"{name} in S", torch.mul, X, Mu[:, -1].unsqueeze(-1))
        S = ws.add_bmm(S * m[:, -1:], A.mT, held)
    return WeightMatrix(ws.add_bmm(after, A.mT, ws(name, torch.mul, X, P)), S, W_init)
