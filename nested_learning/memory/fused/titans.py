"""Titans' memory by the arithmetic of titans_chunk.py: chunk after chunk, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.fused.function import Generic, chunks_of
from nested_learning.memory.fused.scratch import Scratch
from nested_learning.memory.fused.titans_backward import backward_chunk
from nested_learning.memory.fused.titans_chunk import Gates, Saved, finish, forward_chunk, gates
from nested_learning.memory.objective import L2
from nested_learning.memory.retention import Retention
from nested_learning.memory.running import Inputs as StepInputs
from nested_learning.memory.system import MemorySystem, learning_rule

if TYPE_CHECKING:
    from nested_learning.memory.running import MemoryState as RunningWeights

_RULE = learning_rule(ResidualMLP(), L2(), "gd")


def covers(system: MemorySystem) -> bool:
    """Whether this is the system that the arithmetic is for."""
    return (
        isinstance(system.architecture, ResidualMLP)
        and system.architecture == ResidualMLP(expansion=system.architecture.expansion)
        and system.rule == _RULE
        and system.retention == Retention()
        and system.gradient == "anchor"
        and system.rate == "gated"
        and not system.generated
        and not system.self_targets
        and system.momentum
        and system.read == "token"
    )


class _Inputs(NamedTuple):
    """The tensors that a run is a function of."""

    W1: Tensor  # [B, 1, H, d, e]
    W2: Tensor  # [B, 1, H, e, d]
    S1: Tensor  # of W1's shape: the momentum
    S2: Tensor
    W2_init: Tensor  # [1, H, e, d]
    k: Tensor  # [B, H, T, d], and v and q
    v: Tensor
    q: Tensor
    logits: Tensor  # [3, B, H, T] of eta, alpha and mu


def prepare(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    want_surprise: bool,
    generic: Generic,
    operands: torch.dtype | None,
) -> tuple[Titans, _Inputs]:
    """The kernel of a run and its tensors."""
    assert inputs.gates is not None  # no memory generates them
    W = weights.anchor
    S = weights.momentum or {name: torch.zeros_like(w, requires_grad=False) for name, w in W.items()}
    paths = inputs.paths
    tensors = _Inputs(
        W["W1"], W["W2"], S["W1"], S["W2"], initial["W2"], paths["k"], paths["v"], paths["q"], inputs.gates
    )
    kernel = Titans(
        system.chunk_size, system.eta_max, system.momentum_scaled, want_surprise, generic, operands
    )
    return kernel, tensors


@dataclass(frozen=True)
class Titans:
    """See `function.Kernel`; outputs y, W1, W2, their momenta and the surprise."""

    chunk_size: int
    eta_max: float
    momentum_scaled: bool
    want_surprise: bool
    generic: Generic
    operands: torch.dtype | None  # see `Scratch`

    def forward(
        self, tensors: Sequence[Tensor], saved: list[Saved] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        given = _Inputs._make(tensors)
        B, H, T, _ = given.k.shape
        gate = self._gates(given)
        W2_init = _per_row(given.W2_init, B)
        R1, R2 = _stack(self.chunk_size, given, W2_init)
        spare: tuple[Tensor, Tensor] | None = None
        y, ws = torch.empty_like(given.q), Scratch(R1, self.operands)
        surprise = y.new_empty(B, T) if self.want_surprise else None
        for n, columns in enumerate(chunks_of(self.chunk_size, T)):
            k, v, q = (path[:, :, columns].flatten(0, 1) for path in (given.k, given.v, given.q))
            out, kept = forward_chunk(ws, R1, R2, k, v, q, gate.rate[n], gate.total[:, n])
            y[:, :, columns] = out.unflatten(0, (B, H))
            if surprise is not None:
                surprise[:, columns] = kept.error.square().sum(-1).unflatten(0, (B, H)).sum(1).sqrt()
            before = R1, R2
            R1, R2 = spare or (torch.empty_like(R1), torch.empty_like(R2))
            finish(ws, kept, k, R1, R2)
            if saved is None:
                spare = before
            else:
                saved.append(kept)
        return y, *_unstack(R1, R2, given), surprise

    def backward(
        self,
        tensors: Sequence[Tensor],
        after: Sequence[Tensor],
        saved: Sequence[Saved],
        gy: Tensor,
        g_after: Sequence[Tensor],
    ) -> _Inputs:
        given = _Inputs._make(tensors)
        B, H, T, _ = given.k.shape
        gate = self._gates(given)
        g_W1, g_W2, g_S1, g_S2 = g_after
        g_R = _stack(self.chunk_size, given._replace(W1=g_W1, W2=g_W2, S1=g_S1, S2=g_S2), None)
        spare = torch.empty_like(g_R[0]), torch.empty_like(g_R[1])
        g_paths = tuple(torch.empty_like(path) for path in (given.k, given.v, given.q))
        g_log_rate, g_logs = torch.empty_like(gate.rate[..., 0]), torch.empty_like(gate.total[..., 0])
        ws = Scratch(g_R[0], self.operands)
        for n, columns in reversed(list(enumerate(chunks_of(self.chunk_size, T)))):
            k, q, g_out = (path[:, :, columns].flatten(0, 1) for path in (given.k, given.q, gy))
            g = backward_chunk(ws, saved[n], k, q, gate.rate[n], g_R, spare, g_out)
            g_R, spare = spare, g_R
            for g_path, value in zip(g_paths, (g.k, g.v, g.q), strict=True):
                g_path[:, :, columns] = value.unflatten(0, (B, H))
            g_log_rate[n], g_logs[:, n] = g.log_rate, g.logs
        g_W1, g_W2, g_S1, g_S2 = _unstack(*g_R, given, with_initial=False)
        d = given.k.shape[-1]
        g_init = g_R[1][:, 2 * d : 3 * d] - g_R[1][:, :d]  # V2 = W2 − W2_init
        g_init = g_init.mT.unflatten(0, (B, H)).sum(0).unsqueeze(0)
        g_logits = _logits_backward(gate, g_log_rate, g_logs, self.momentum_scaled)
        g_logits = g_logits.transpose(1, 2).flatten(2).unflatten(1, (B, H))
        return _Inputs._make((g_W1, g_W2, g_S1, g_S2, g_init, *g_paths, g_logits))

    def reference(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given = _Inputs._make(tensors)
        y, W, S = self.generic(
            {"W1": given.W1[0], "W2": given.W2_init},  # of W1's initial value nothing is used but its shape
            {"W1": given.W1, "W2": given.W2},
            {"W1": given.S1, "W2": given.S2},
            StepInputs({"k": given.k, "v": given.v, "q": given.q}, given.logits),
            None,
        )
        assert S is not None
        return y, W["W1"], W["W2"], S["W1"], S["W2"]

    def _gates(self, given: _Inputs) -> Gates:
        return gates(given.logits, self.eta_max, self.momentum_scaled, self.chunk_size)


def _per_row(W: Tensor, batch: int) -> Tensor:
    """[1, H, out, in] -> [B·H, in, out]."""
    return W.expand(batch, *W.shape[1:]).flatten(0, 1).mT


def _stack(chunk_size: int, W: _Inputs, W2_init: Tensor | None) -> tuple[Tensor, Tensor]:
    """The buffers R1 and R2 of `titans_chunk` with the weights in place; their writes are not set.

    Without W2_init: those of gradients, where W2 = V2 + W2_init gives both the same.
    """
    W1, W2, S1, S2 = (w.flatten(0, 2).mT for w in (W.W1, W.W2, W.S1, W.S2))
    M, e, d = W1.shape
    R1, R2 = W1.new_empty(M, 2 * e + chunk_size, d), W1.new_empty(M, 3 * d + chunk_size, e)
    R1[:, :e], R1[:, e : 2 * e] = W1, S1
    R2[:, :d] = W2 if W2_init is None else W2 - W2_init
    R2[:, d : 2 * d] = S2
    R2[:, 2 * d : 3 * d] = W2 if W2_init is None else W2_init
    return R1, R2


def _unstack(
    R1: Tensor, R2: Tensor, like: _Inputs, with_initial: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W1, W2, S1, S2 in the shapes of `like`, new tensors."""
    e, d = like.W2.shape[-2:]
    W2 = R2[:, :d] + R2[:, 2 * d : 3 * d] if with_initial else R2[:, :d]
    parts = (R1[:, :e], W2, R1[:, e : 2 * e], R2[:, d : 2 * d])
    shapes = (like.W1.shape, like.W2.shape, like.W1.shape, like.W2.shape)
    W1, W2, S1, S2 = (
        p.mT.clone(memory_format=torch.contiguous_format).view(s) for p, s in zip(parts, shapes, strict=True)
    )
    return W1, W2, S1, S2


def _logits_backward(gate: Gates, g_log_rate: Tensor, g_logs: Tensor, scaled: bool) -> Tensor:
    """The gradients to the logits of eta, alpha and mu [3, n, M, C]."""
    g_logs = g_logs.masked_fill(gate.clamped, 0.0)
    g = torch.cat([g_log_rate.unsqueeze(0), g_logs]).mul_(1 - gate.sigmoids)
    if scaled:  # the rate has the factor 1 − mu
        g[2].addcmul_(g_log_rate, gate.sigmoids[2], value=-1)
    return g
