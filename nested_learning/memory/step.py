"""The generic step of every memory layer: tokens that lie within one chunk of every memory.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width. Weights are stacked
[B, N, H, out, in]; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.architecture import Down, Trace
from nested_learning.memory.description import MatrixRule, MemorySystem
from nested_learning.memory.objective import AtKey, Dot
from nested_learning.memory.signals import Readouts, Signals, StepInputs, generate_signals
from nested_learning.ops.delta_rule.chunk import Chunk, Decay
from nested_learning.ops.norm import clip_norm

Weights = dict[str, Tensor]  # matrix name -> [B, N, H, out, in]


class RunningWeights(NamedTuple):
    """The weights of all memories while they run."""

    anchor: Weights
    current: Weights
    momentum: Weights | None

    @property
    def at_anchor(self) -> bool:
        """Whether the current weights are the anchors, known without a look at the numbers."""
        return all(self.current[name] is W for name, W in self.anchor.items())


class StepOutputs(NamedTuple):
    y: Tensor  # [B, H, C, d]
    surprise: Tensor | None  # [B, C]
    current: Weights
    momentum: Weights | None


def step(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    want_surprise: bool,
) -> StepOutputs:
    """C tokens that lie within one chunk of every memory.

    Signals, targets and gradients come from `anchor`; the weights move on from `current` token by token,
    exactly, by the delta-rule recurrence (spec section 4). Where the retention is not linear, both hold what
    accumulates, and the weights are the retention's map of the anchor.
    """
    anchor, current, momentum = weights
    fixed = {name: system.retention.weights(A) for name, A in anchor.items()}
    signals = generate_signals(system, fixed, inputs, readouts)
    writes, error = _token_writes(system, signals) if system.exact else _writes(system, fixed, signals)

    eta, log_alpha = signals.eta.unsqueeze(1), signals.log_alpha.unsqueeze(1)  # [B, 1, H, C]
    log_mu = None if signals.log_mu is None else signals.log_mu.unsqueeze(1)
    rate = eta
    if log_mu is not None and system.momentum_scaled:
        rate = eta * -torch.expm1(log_mu)  # 1 − μ
    write = None
    if inputs.write is not None and system.momentum:
        write = inputs.write[:, None, None, :].to(eta.dtype)  # [B, 1, 1, C]
    decay = Decay(log_alpha)
    momentum_decay = None if log_mu is None else Decay(log_mu)
    at_anchor = weights.at_anchor and system.retention.form == "linear"
    chunks = {
        name: Chunk(
            current[name],
            w.x,
            rate.unsqueeze(-1) * w.direction,
            decay,
            erase=_erase_rate(system, system.rule[name], eta, log_alpha),
            S=None if momentum is None else momentum[name],
            mu=momentum_decay,
            write=write,
            W_init=initial[name] if system.rule[name].retain == "initial" else None,
            Wx=w.answer if at_anchor else None,
        )
        for name, w in writes.items()
    }
    y = _read(system, anchor, fixed, chunks, signals.q)
    surprise = None
    if want_surprise:
        if error is None:  # that of the weights as the token meets them
            (chunk,) = chunks.values()
            error = chunk.answer_before() - (signals.k if system.transposed else signals.v).unsqueeze(1)
        surprise = error[:, -1].detach().square().sum((1, 3)).sqrt()  # of the memory that is read out
    final = {name: chunk.final() for name, chunk in chunks.items()}
    return StepOutputs(
        y,
        surprise,
        {name: W for name, (W, _) in final.items()},
        {name: S for name, (_, S) in final.items() if S is not None} if system.momentum else None,
    )


def _erase_rate(system: MemorySystem, rule: MatrixRule, eta: Tensor, log_alpha: Tensor) -> Tensor | None:
    """What the write takes off the answer to its key [B, 1, H, C].

    A gradient taken at every token, M(k) − v at the decayed weights, has its −M(k) here: α_t η_t.
    """
    if system.exact and not isinstance(rule.objective, Dot):
        return eta * log_alpha.exp()
    return eta if rule.erase else None


class _Write(NamedTuple):
    """What one matrix is to learn at each token of a chunk, before the learning rate."""

    x: Tensor  # [B, N or 1, H, C, d_in] its input
    direction: Tensor  # [B, N, H, C, d_out] minus the gradient at its output
    answer: Tensor | None  # [B, N, H, C, d_out] W x at the anchor, from the forward pass


def _token_writes(system: MemorySystem, signals: Signals) -> tuple[dict[str, _Write], None]:
    """The writes of a matrix memory whose gradients are taken at every token."""
    x, target = (signals.v, signals.k) if system.transposed else (signals.k, signals.v)
    return {system.architecture.output: _Write(x.unsqueeze(1), target.unsqueeze(1), None)}, None


def _writes(system: MemorySystem, weights: Weights, signals: Signals) -> tuple[dict[str, _Write], Tensor]:
    """The writes of one inner step at the anchor `weights`, and the error M(k) − v̂ [B, N, H, C, d]."""
    architecture, rule = system.architecture, system.rule
    key, value, trace = _targets(system, weights, signals)
    width = None if signals.width is None else signals.width.unsqueeze(1)
    at = AtKey(value, value - key if architecture.skip else value, trace.answer, width)
    output = rule[architecture.output].objective
    hidden = next((r.objective for name, r in rule.items() if name != architecture.output), output)
    down = output.direction(at)
    below = down if hidden == output else hidden.direction(at)
    directions = architecture.directions(trace, Down(down, below), weights)
    writes = {
        name: _Write(trace.inputs[name], _clipped(d, rule[name].clip), trace.outputs[name])
        for name, d in directions.items()
    }
    return writes, at.error


def _clipped(direction: Tensor, limit: float | None) -> Tensor:
    return direction if limit is None else clip_norm(direction, limit)


def _targets(system: MemorySystem, weights: Weights, signals: Signals) -> tuple[Tensor, Tensor, Trace]:
    """k [B, 1, H, C, d], v̂ and the forward pass at k of all memories, from one pass over [v; k]."""
    key, value = signals.k.unsqueeze(1), signals.v.unsqueeze(1)
    architecture = system.architecture
    if not system.self_targets:
        return key, value, architecture.evaluate(key, weights)
    at_value, at_key = architecture.evaluate(torch.cat([value, key], dim=-2), weights).halves()
    target = value + at_value.answer if architecture.skip else at_value.answer
    return key, clip_norm(target), at_key


def _read(
    system: MemorySystem, anchor: Weights, fixed: Weights, chunks: Mapping[str, Chunk], q: Tensor
) -> Tensor:
    """y of the memory that is read out [B, H, C, d]: at each token's own weights, or at the anchor."""
    if system.read == "chunk":
        return system.architecture.read(q, lambda name, x: x @ fixed[name][:, -1].mT)
    last = {name: chunk.select_last(dim=-4) for name, chunk in chunks.items()}
    q = q.unsqueeze(1)
    if system.transposed:
        return last[system.architecture.output].read_transposed(q).squeeze(1)
    if system.retention.form == "lq":
        # what accumulates is read token by token, its norm is that of the anchor
        scale = {name: system.retention.scale(A[:, -1:]) for name, A in anchor.items()}
        read = system.architecture.read(q, lambda name, x: scale[name] * last[name].read(x))
    else:
        read = system.architecture.read(q, lambda name, x: last[name].read(x))
    return read.squeeze(1)
