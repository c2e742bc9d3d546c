"""One token of self-modifying Titans without gradients, in few operations: what generation costs.

The generic step is built for chunks; for one token its triangular systems, decays within a chunk and autograd
functions are overhead. Here is the recurrence itself, in column vectors. Products of many matrices take them
as one batch, so B rows, N memories and H heads are one dimension, R = B · N · H, where products want them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.engines import chunked
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.delta_rule.chunk import LOG_FLOOR
from nested_learning.ops.mlp_memory import HIDDEN_FLOOR


class Fixed(NamedTuple):
    """The anchors, as all products with them take them."""

    W1: Tensor  # [R, d, e]
    W2: Tensor  # [R, e, d]
    floor: Tensor  # [] the floor of the hidden norm


class TokenWrite(NamedTuple):
    """Writes of one token into all memories; [R, ·, 1]."""

    key: Tensor  # k, the input of W2
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
    W1, W2 = W["W1"], W["W2"]
    B, N, H, d, e = W1.shape
    floor = torch.scalar_tensor(HIDDEN_FLOOR, dtype=W1.dtype, device=W1.device)
    fixed = Fixed(anchor["W1"].flatten(0, 2), anchor["W2"].flatten(0, 2), floor)
    vectors, q, eta, alpha = _signals(system, fixed, inputs)
    if inputs.real is not None:  # padding changes nothing
        real = inputs.real.view(-1, 1, 1, 1, 1)
        eta, alpha = eta * real, torch.where(real, alpha, 1.0)
    if system.pace is not None:  # [B, N, H, 1, 1]: the generating memories are slower
        pace = F.pad(eta.new_full((N - 1,), system.pace), (0, 1), value=1.0).view(N, 1, 1, 1)
        eta, alpha = eta * pace, alpha.clamp_min(math.exp(LOG_FLOOR)) ** pace
    pairs = vectors[:, :2].permute(0, 2, 3, 1)  # [B, H, d, 2] k and v
    w = _write(fixed, torch.cat([pairs] * N, dim=1).view(B * N * H, d, 2))
    # eq 88, the rule of each matrix as in `learning_rule`; η is eta_max · eta
    pull = (w.residual - torch.bmm(W1.flatten(0, 2), w.u)).view(B, N, H, d, 1) * eta
    W1 = (W1 * alpha).addcmul_(pull, w.u.view(B, N, H, 1, e), value=system.eta_max)
    push = w.gradient.view(B, N, H, e, 1) * eta
    W2 = torch.lerp(initial["W2"], W2, alpha).addcmul_(push, w.key.view(B, N, H, 1, d), value=system.eta_max)
    hidden = _hidden(torch.bmm(W2[:, -1].flatten(0, 1), q), floor)[0]
    y = torch.bmm(W1[:, -1].flatten(0, 1), hidden).add_(q)  # y_t = M_memory,t(q_t)
    current = {"W1": W1, "W2": W2}
    after = boundaries.anchors(system.chunk_sizes, 1, current, anchor)
    surprise = None
    if how.surprise:
        surprise = w.error.view(B, N, H * d)[:, -1].norm(dim=1, keepdim=True)
    return y.view(B, H, 1, d), MemoryState(after, current, None, state.position, state.conv_tail), surprise


def _signals(system: MemorySystem, fixed: Fixed, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounded vectors [B, N, H, d], of which k and v are the first, q [B · H, d, 1], and η / eta_max and α
    [B, 1, H, 1, 1] (eq 86)."""
    assert inputs.readouts is not None  # its gates are generated
    x_k, x_v, x_q = inputs.paths["k"], inputs.paths["v"], inputs.paths["q"]
    B, H, _, d = x_k.shape
    adaptive_q = "q" in system.generated
    # the memory that is read out runs along: cutting it off would copy the weights
    sources = [x_k, x_v, x_q, x_k, x_k, x_q] if adaptive_q else [x_k, x_v, x_k, x_k, x_q]
    x = torch.cat(sources, dim=1).view(B * H * len(sources), d, 1)
    made = torch.bmm(fixed.W1, _hidden(torch.bmm(fixed.W2, x), fixed.floor)[0]).add_(x)
    made = made.view(B, len(sources), H, d)
    weight, bias = inputs.readouts
    logits = (made[:, -3:-1] * weight).sum(-1).add_(bias)  # [B, 2, H]
    eta, alpha = logits.sigmoid_().view(B, 2, 1, H, 1, 1).unbind(1)
    if system.capped:
        eta = eta * (1 + alpha).clamp_max_(system.eta_max).div_(system.eta_max)
    vectors = _bounded(made, -1)
    return vectors, (vectors[:, 2] if adaptive_q else x_q).reshape(B * H, d, 1), eta, alpha


def _write(fixed: Fixed, pairs: Tensor) -> TokenWrite:
    """The targets of eq 87 and the gradient in eq 88 of all memories, at the anchor.

    Args:
        pairs: [R, d, 2], key and value of each memory.
    """
    z = torch.bmm(fixed.W2, pairs)
    hidden, length = _hidden(z, fixed.floor)
    made = torch.bmm(fixed.W1, hidden).add_(pairs)  # M(k), M(v)
    target = _bounded(made[..., 1:], -2)
    key, u, error = pairs[..., :1], hidden[..., :1], target - made[..., :1]
    g = torch.bmm(error.mT, fixed.W1).view(u.shape)  # W1ᵀ error, from the left
    across = torch.addcmul(g, u, (u * g).sum(-2, keepdim=True), value=-1).div_(length[..., :1])
    gradient = _bounded(torch.ops.aten.silu_backward(across, z[..., :1]), -2)
    return TokenWrite(key, u, target - key, error, gradient)


def _hidden(z: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """n(silu(z)) along the last dimension but one, and what it divides by."""
    h = F.silu(z)
    length = torch.linalg.vector_norm(h, dim=-2, keepdim=True).hypot_(floor)
    return h.div_(length), length


def _bounded(x: Tensor, dim: int) -> Tensor:
    """x scaled down along a dimension to a norm of at most 1."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min_(1.0)
