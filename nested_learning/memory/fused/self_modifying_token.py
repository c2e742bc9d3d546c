"""One token of self-modifying Titans without gradients, in few operations: what generation costs.

The generic step is built for chunks; for one token its triangular systems, decays within a chunk and autograd
functions are overhead. Here is the recurrence itself. Column vectors; B batch, N memories, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.description import MemorySystem
from nested_learning.memory.engines import chunked
from nested_learning.ops.mlp_memory import HIDDEN_FLOOR

if TYPE_CHECKING:
    from nested_learning.memory.signals import Readouts

Weights = dict[str, Tensor]


class TokenOutputs(NamedTuple):
    y: Tensor  # [B, H, 1, d]
    surprise: Tensor  # [B, 1]
    current: Weights


class _Writes(NamedTuple):
    """What one token writes into all memories; [B, N, H, ·, 1]."""

    u: Tensor  # hidden key, the input of W1
    residual: Tensor  # v̂ − k
    error: Tensor  # v̂ − M(k)
    gradient: Tensor  # minus the gradient at W2's output, clipped


def supports(system: MemorySystem) -> bool:
    """Whether `run` covers this system and call."""
    covered = bool(system.generated) and chunked.covers(system)
    return covered and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def run(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    anchor: Weights,
    current: Weights,
    paths: Mapping[str, Tensor],
    readouts: Readouts,
    real: Tensor | None,
) -> TokenOutputs:
    """The token's read-out and the weights after it.

    Args:
        initial: per matrix [N, H, out, in].
        anchor, current: per matrix [B, N, H, out, in].
        paths: "k", "v", "q": [B, H, 1, d], unit-norm.
        real: [B] bool, False where the token is padding and changes nothing; None: all are real.
    """
    k, v, q, eta, alpha = _signals(system, anchor, paths, readouts)
    if real is not None:
        eta, alpha = eta * real.view(-1, 1, 1, 1, 1), torch.where(real.view(-1, 1, 1, 1, 1), alpha, 1.0)
    w = _writes(anchor, k, v)
    old1, old2 = current["W1"], current["W2"]
    W1 = torch.addcmul(old1 * alpha, (w.residual - old1 @ w.u).mul_(eta), w.u.mT)
    W2 = torch.addcmul(torch.lerp(initial["W2"], old2, alpha), w.gradient * eta, k.mT)
    y = (q + W1[:, -1] @ _hidden(W2[:, -1] @ q)[0]).mT
    return TokenOutputs(y, w.error[:, -1].flatten(1).norm(dim=1, keepdim=True), {"W1": W1, "W2": W2})


def _signals(
    system: MemorySystem, anchor: Weights, paths: Mapping[str, Tensor], readouts: Readouts
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """k, v [B, 1, H, d, 1], q [B, H, d, 1], η and α [B, 1, H, 1, 1]."""
    x_k, x_v, x_q = paths["k"], paths["v"], paths["q"]
    adaptive_q = "q" in system.generated
    # the memory that is read out runs along: cutting it off would copy the weights
    sources = [x_k, x_v, x_q, x_k, x_k, x_q] if adaptive_q else [x_k, x_v, x_k, x_k, x_q]
    x = torch.stack(sources, dim=1).mT  # [B, N, H, d, 1]
    made = x + anchor["W1"] @ _hidden(anchor["W2"] @ x)[0]
    vectors = _bounded(made[:, :-3])
    logits = (made[:, -3:-1].squeeze(-1) * readouts.weight).sum(-1) + readouts.bias  # [B, 2, H]
    gates = torch.sigmoid(logits)[..., None, None]
    q = vectors[:, 2] if adaptive_q else x_q.mT
    return vectors[:, :1], vectors[:, 1:2], q, gates[:, :1] * system.eta_max, gates[:, 1:]


def _writes(anchor: Weights, k: Tensor, v: Tensor) -> _Writes:
    W1 = anchor["W1"]
    z = anchor["W2"] @ torch.cat([k, v], dim=-1)  # [B, N, H, e, 2]
    hidden, f = _hidden(z)
    answer = W1 @ hidden
    residual = _bounded(v + answer[..., 1:]) - k
    error = residual - answer[..., :1]
    u = hidden[..., :1]
    g = W1.mT @ error
    across = torch.addcmul(g, u, (u * g).sum(-2, keepdim=True), value=-1).mul_(f[..., :1])
    return _Writes(u, residual, error, _bounded(torch.ops.aten.silu_backward(across, z[..., :1])))


def _hidden(z: Tensor) -> tuple[Tensor, Tensor]:
    """n(silu(z)) along the last dimension but one, and the factor of n."""
    h = F.silu(z)
    f = h.square().sum(-2, keepdim=True).add_(HIDDEN_FLOOR**2).rsqrt_()
    return h.mul_(f), f


def _bounded(x: Tensor) -> Tensor:
    """x scaled down along the last dimension but one to a norm of at most 1."""
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min_(1.0)
