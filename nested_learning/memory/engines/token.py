"""One token of self-modifying Titans without gradients, in few operations: what generation costs.

The generic step is built for chunks; for one token its triangular systems, decays within a chunk and autograd
functions are overhead. Here is the recurrence itself, in row vectors. Products of many matrices take them as
one batch, so B rows, N memories and H heads are one dimension, R = B · N · H, where products want them.
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
from nested_learning.ops.norm import inverse_norm


class TokenWrite(NamedTuple):
    """Writes of one token into all memories; [R, 1, ·]."""

    key: Tensor  # k, the input of W2
    u: Tensor  # hidden key, the input of W1
    residual: Tensor  # v̂ − k
    error: Tensor  # v̂ − M(k)
    gradient: Tensor  # minus the gradient at W2's output, clipped


def can_run(system: MemorySystem, call: Call) -> bool:
    """Self-modifying Titans without gradients, a token at a time."""
    plain = not (call.grad or call.traced or call.checked)
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
    A1, A2 = anchor["W1"].flatten(0, 2), anchor["W2"].flatten(0, 2)
    vectors, q, eta, alpha = _signals(system, A1, A2, inputs)
    if inputs.real is not None:  # padding changes nothing
        real = inputs.real.view(-1, 1, 1, 1, 1)
        eta, alpha = eta * real, torch.where(real, alpha, 1.0)
    w = _write(A1, A2, torch.stack([vectors[:, :2].transpose(1, 2)] * N, dim=1).flatten(0, 2))
    # eq 88, the rule of each matrix as in `learning_rule`; η is eta_max · eta
    pull = (w.residual - torch.bmm(w.u, W1.flatten(0, 2).mT)).view(B, N, H, d, 1) * eta
    W1 = (W1 * alpha).addcmul_(pull, w.u.view(B, N, H, 1, e), value=system.eta_max)
    push = w.gradient.view(B, N, H, e, 1) * eta
    W2 = torch.lerp(initial["W2"], W2, alpha).addcmul_(push, w.key.view(B, N, H, 1, d), value=system.eta_max)
    q = q.flatten(0, 1)
    hidden = _hidden(torch.bmm(q, W2[:, -1].flatten(0, 1).mT))[0]
    y = torch.baddbmm(q, hidden, W1[:, -1].flatten(0, 1).mT)  # y_t = M_memory,t(q_t)
    current = {"W1": W1, "W2": W2}
    after = boundaries.anchors(system.chunk_sizes, 1, current, anchor)
    surprise = None
    if how.surprise:
        surprise = w.error.view(B, N, H * d)[:, -1].norm(dim=1, keepdim=True)
    return y.view(B, H, 1, d), MemoryState(after, current, None, state.position, state.conv_tail), surprise


def _signals(
    system: MemorySystem, A1: Tensor, A2: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bounded vectors [B, N, H, d], of which k and v are the first, q [B, H, 1, d], and η / eta_max and α
    [B, 1, H, 1, 1] (eq 86)."""
    assert inputs.readouts is not None  # its gates are generated
    x_k, x_v, x_q = inputs.paths["k"], inputs.paths["v"], inputs.paths["q"]
    adaptive_q = "q" in system.generated
    # the memory that is read out runs along: cutting it off would copy the weights
    sources = [x_k, x_v, x_q, x_k, x_k, x_q] if adaptive_q else [x_k, x_v, x_k, x_k, x_q]
    x = torch.stack(sources, dim=1)  # [B, N, H, 1, d]
    rows = x.flatten(0, 2)
    made = torch.baddbmm(rows, _hidden(torch.bmm(rows, A2.mT))[0], A1.mT).view(x.shape)
    weight, bias = inputs.readouts
    logits = (made[:, -3:-1].squeeze(3) * weight).sum(-1).add_(bias)  # [B, 2, H]
    eta, alpha = logits.sigmoid_()[:, :, None, :, None, None].unbind(1)
    vectors = _bounded(made).squeeze(3)
    return vectors, vectors[:, 2].unsqueeze(2) if adaptive_q else x_q, eta, alpha


def _write(A1: Tensor, A2: Tensor, pairs: Tensor) -> TokenWrite:
    """The targets of eq 87 and the gradient in eq 88 of all memories, at the anchor.

    Args:
        A1, A2: [R, d, e] and [R, e, d], the anchors.
        pairs: [R, 2, d], key and value of each memory.
    """
    z = torch.bmm(pairs, A2.mT)
    hidden, f = _hidden(z)
    answer, target = torch.baddbmm(pairs, hidden, A1.mT).split(1, dim=1)  # M(k), M(v)
    target = _bounded(target)
    key, u, error = pairs[:, :1], hidden[:, :1], target - answer
    g = torch.bmm(error, A1)
    across = torch.addcmul(g, u, (u * g).sum(-1, keepdim=True), value=-1).mul_(f[:, :1])
    gradient = _bounded(torch.ops.aten.silu_backward(across, z[:, :1]))
    return TokenWrite(key, u, target - key, error, gradient)


def _hidden(z: Tensor) -> tuple[Tensor, Tensor]:
    """n(silu(z)) along the last dimension, and the factor of n."""
    h = F.silu(z)
    f = inverse_norm(h, 1.0, HIDDEN_FLOOR**2)
    return h.mul_(f), f


def _bounded(x: Tensor) -> Tensor:
    """x scaled down along the last dimension to a norm of at most 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1.0)
