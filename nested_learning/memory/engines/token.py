"""One token of self-modifying Titans without gradients, in few operations: what generation costs.

The generic step is built for chunks; for one token its triangular systems, decays within a chunk and autograd
functions are overhead. Here is the recurrence itself. Column vectors; B batch, N memories, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.engines import chunked
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.mlp_memory import HIDDEN_FLOOR


class TokenWrite(NamedTuple):
    """Writes of one token into all memories; [B, N, H, ·, 1]."""

    u: Tensor  # hidden key, the input of W1
    residual: Tensor  # v̂ − k
    error: Tensor  # v̂ − M(k)
    gradient: Tensor  # minus the gradient at W2's output, clipped


def can_run(system: MemorySystem, call: Call) -> bool:
    """Self-modifying Titans without gradients, a token at a time."""
    plain = (call.compiling or not call.traced) and not (call.grad or call.checked)
    return call.one_token and plain and bool(system.generated) and chunked.covers(system)


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Results of `generic.run` for one token."""
    anchor, W = state.anchor, state.current
    k, v, q, eta, alpha = _signals(system, anchor, inputs)
    if inputs.real is not None:  # padding changes nothing
        real = inputs.real.view(-1, 1, 1, 1, 1)
        eta, alpha = eta * real, torch.where(real, alpha, 1.0)
    w = _write(anchor, k, v)
    # eq 88, the rule of each matrix as in `learning_rule`
    W1 = torch.addcmul(W["W1"] * alpha, (w.residual - W["W1"] @ w.u).mul_(eta), w.u.mT)
    W2 = torch.addcmul(torch.lerp(initial["W2"], W["W2"], alpha), w.gradient * eta, k.mT)
    y = (q + W1[:, -1] @ _hidden(W2[:, -1] @ q)[0]).mT  # y_t = M_memory,t(q_t)
    current = {"W1": W1, "W2": W2}
    after = boundaries.anchors(system.chunk_sizes, 1, current, anchor)
    surprise = w.error[:, -1].flatten(1).norm(dim=1, keepdim=True) if how.surprise else None
    return y, MemoryState(after, current, None, state.position, state.conv_tail), surprise


def _signals(
    system: MemorySystem, anchor: Weights, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """k, v [B, 1, H, d, 1], q [B, H, d, 1], η and α [B, 1, H, 1, 1] (eq 86)."""
    assert inputs.readouts is not None  # its gates are generated
    x_k, x_v, x_q = inputs.paths["k"], inputs.paths["v"], inputs.paths["q"]
    adaptive_q = "q" in system.generated
    # the memory that is read out runs along: cutting it off would copy the weights
    sources = [x_k, x_v, x_q, x_k, x_k, x_q] if adaptive_q else [x_k, x_v, x_k, x_k, x_q]
    x = torch.stack(sources, dim=1).mT  # [B, N, H, d, 1]
    made = x + anchor["W1"] @ _hidden(anchor["W2"] @ x)[0]
    vectors = _bounded(made[:, :-3])
    weight, bias = inputs.readouts
    logits = (made[:, -3:-1].squeeze(-1) * weight).sum(-1) + bias  # [B, 2, H]
    gates = torch.sigmoid(logits)[..., None, None]
    q = vectors[:, 2] if adaptive_q else x_q.mT
    return vectors[:, :1], vectors[:, 1:2], q, gates[:, :1] * system.eta_max, gates[:, 1:]


def _write(anchor: Weights, k: Tensor, v: Tensor) -> TokenWrite:
    """The targets of eq 87 and the gradient in eq 88 of all memories, at the anchor."""
    W1 = anchor["W1"]
    z = anchor["W2"] @ torch.cat([k, v], dim=-1)  # [B, N, H, e, 2]
    hidden, f = _hidden(z)
    answer = W1 @ hidden
    residual = _bounded(v + answer[..., 1:]) - k
    error = residual - answer[..., :1]
    u = hidden[..., :1]
    g = W1.mT @ error
    across = torch.addcmul(g, u, (u * g).sum(-2, keepdim=True), value=-1).mul_(f[..., :1])
    return TokenWrite(u, residual, error, _bounded(torch.ops.aten.silu_backward(across, z[..., :1])))


def _hidden(z: Tensor) -> tuple[Tensor, Tensor]:
    """n(silu(z)) along the last dimension but one, and the factor of n."""
    h = F.silu(z)
    f = h.square().sum(-2, keepdim=True).add_(HIDDEN_FLOOR**2).rsqrt_()
    return h.mul_(f), f


def _bounded(x: Tensor) -> Tensor:
    """x scaled down along the last dimension but one to a norm of at most 1."""
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min_(1.0)
