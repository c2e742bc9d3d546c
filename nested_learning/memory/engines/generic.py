"""The generic engine: any system, step by step; the definition that the other engines are compared with.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width. Weights are stacked
[B, N, H, out, in]; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory import check
from nested_learning.memory.architecture import Down, Trace
from nested_learning.memory.engines import exact
from nested_learning.memory.objective import AtKey
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.signals import Signals, signals
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MatrixRule, MemorySystem
from nested_learning.ops.delta_rule.chunk import LOG_FLOOR, Chunk
from nested_learning.ops.delta_rule.one_token import ONE, SEVERAL, OneToken
from nested_learning.ops.norm import clip_norm

# y [B, H, C, d], current weights, momentum, surprise [B, C] of a step.
StepFunction = Callable[..., tuple[Tensor, Weights, Weights | None, Tensor | None]]


def can_run(system: MemorySystem, call: Call) -> bool:
    """Always."""
    return True


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
    step_by: StepFunction | None = None,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """All tokens of a run: y [B, H, T, d], the state after them, and the surprise [B, T] if wanted.

    Args:
        initial: per matrix [N, H, out, in], the meta-learned initial memories, which retention may pull to.
        step_by: the function that takes a step; None for that of the system's gradient.
    """
    take = step_by or (exact.step if system.exact else step)
    tokens, checked = 0, check.enabled()
    ys, surprises = [], []
    length = inputs.paths["k"].shape[2]
    # A length that torch.export leaves open has no number of chunks: the closed form takes any at once.
    whole = isinstance(length, torch.SymInt) and system.exact
    pieces = [inputs] if whole or length <= system.step else inputs.split(system.step)
    for index, piece in enumerate(pieces):
        y, current, momentum, surprise = take(system, initial, state, piece, how.surprise)
        if checked:
            written = {**current, **{f"the momentum of {n}": S for n, S in (momentum or {}).items()}}
            check.check_step(system.memories, index, {"y": y}, written)
        tokens += y.shape[2]
        anchor = current
        if not system.exact:  # eq 90: gradients and signals come from the last boundary's weights
            anchor = boundaries.anchors(system.chunk_sizes, tokens, current, state.anchor)
        state = MemoryState(anchor, current, momentum, state.position, state.conv_tail)
        ys.append(y)
        surprises.append(surprise)
    joined = torch.cat([s for s in surprises if s is not None], dim=1) if how.surprise else None
    return torch.cat(ys, dim=2), state, joined


def step(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, want_surprise: bool
) -> tuple[Tensor, Weights, Weights | None, Tensor | None]:
    """C tokens that lie within one chunk of every memory; results as `StepFunction` has them.

    Signals, targets and gradients come from the anchor; the weights move on from `current` token by token,
    exactly, by the delta-rule recurrence (spec section 4). Where the retention is not linear, both hold what
    accumulates, and the weights are the retention's map of the anchor.
    """
    weights = {name: system.retention.weights(A) for name, A in state.anchor.items()}
    s = signals(system, weights, inputs)  # eq 86
    key, target, trace = _targets(system, weights, s)  # eq 87
    writes, error = _writes(system, weights, s, key, target, trace)  # the gradient in eq 88

    chunk, decay = ONE if s.k.shape[2] == 1 else SEVERAL
    # [B, 1, H, C] and [B, 1, 1, C]: the same for all memories
    gate = s.gates
    eta, rate, log_alpha = (t.unsqueeze(1) for t in (gate.eta, gate.rate, gate.log_alpha))
    if system.pace is not None:  # [B, N, H, C]: the generating memories are slower
        N = len(system.memories)
        pace = F.pad(eta.new_full((N - 1,), system.pace), (0, 1), value=1.0).view(N, 1, 1)
        eta, rate, log_alpha = eta * pace, rate * pace, log_alpha.clamp_min(LOG_FLOOR) * pace
    alpha = decay(log_alpha)
    mu = None if gate.log_mu is None else decay(gate.log_mu.unsqueeze(1))
    write = None
    if inputs.real is not None and system.momentum:  # a padded token takes nothing from the momentum either
        write = inputs.real[:, None, None, :].to(eta.dtype)
    at_anchor = state.at_anchor and system.retention.form == "linear"
    chunks = {
        name: chunk(  # eq 88
            state.current[name],
            w.x,
            rate.unsqueeze(-1) * w.direction,
            alpha,
            erase=eta if system.rule[name].erase else None,
            S=None if state.momentum is None else state.momentum[name],
            mu=mu,
            write=write,
            W_init=initial[name] if system.rule[name].retain == "initial" else None,
            Wx=w.answer if at_anchor else None,
        )
        for name, w in writes.items()
    }
    y = _read(system, state.anchor, weights, chunks, s.q)
    surprise = None
    if want_surprise:  # error of the memory that is read out
        surprise = error[:, -1].detach().square().sum((1, 3)).sqrt()
    after = {name: part.final() for name, part in chunks.items()}
    momentum = {name: S for name, (_, S) in after.items() if S is not None} if system.momentum else None
    return y, {name: W for name, (W, _) in after.items()}, momentum, surprise


def signals_and_target(system: MemorySystem, anchor: Weights, inputs: Inputs) -> tuple[Signals, Tensor]:
    """Signals of tokens within one chunk, as in `step`, and v̂ [B, H, C, d] of the memory that is read out.

    Args:
        anchor: as in a state, before the retention's map.
    """
    weights = {name: system.retention.weights(A) for name, A in anchor.items()}
    s = signals(system, weights, inputs)
    return s, _targets(system, weights, s)[1][:, -1]


class MatrixWrite(NamedTuple):
    """Writes of a chunk's tokens into one matrix, before the learning rate."""

    x: Tensor  # [B, N or 1, H, C, d_in] its input
    direction: Tensor  # [B, N, H, C, d_out] minus the gradient at its output
    answer: Tensor  # [B, N, H, C, d_out] W x at the anchor, from the forward pass


def _targets(system: MemorySystem, weights: Weights, s: Signals) -> tuple[Tensor, Tensor, Trace]:
    """k [B, 1, H, C, d], v̂ and the forward pass at k of all memories, from one pass over [v; k]."""
    key, value = s.k.unsqueeze(1), s.v.unsqueeze(1)
    architecture = system.architecture
    if not system.self_targets:
        return key, value, architecture.evaluate(key, weights)
    at_value, at_key = architecture.evaluate(torch.cat([value, key], dim=-2), weights).halves()
    target = value + at_value.answer if architecture.skip else at_value.answer  # eq 87: v̂_□ = M_□(v)
    return key, clip_norm(target), at_key


def _writes(
    system: MemorySystem, weights: Weights, s: Signals, key: Tensor, target: Tensor, trace: Trace
) -> tuple[dict[str, MatrixWrite], Tensor]:
    """The writes of one inner step at the anchor, and the error M(k) − v̂ [B, N, H, C, d]."""
    architecture, rule = system.architecture, system.rule
    width = None if s.gates.width is None else s.gates.width.unsqueeze(1)
    at = AtKey(target, target - key if architecture.skip else target, trace.answer, width)
    output = rule[architecture.output].objective
    hidden = next((r.objective for name, r in rule.items() if name != architecture.output), output)
    down = output.direction(at)
    below = down if hidden == output else hidden.direction(at)
    directions = architecture.directions(trace, Down(down, below), weights)
    N = trace.answer.shape[1]
    return {
        name: MatrixWrite(trace.inputs[name], _clipped(_of_all(d, N), rule[name]), trace.outputs[name])
        for name, d in directions.items()
    }, at.error


def _of_all(direction: Tensor, memories: int) -> Tensor:
    """A direction [B, N, …] for each memory; that of "dot", in which none has a part, is one for all."""
    return direction if direction.shape[1] == memories else direction.expand(-1, memories, -1, -1, -1)


def _clipped(direction: Tensor, rule: MatrixRule) -> Tensor:
    return direction if rule.clip is None else clip_norm(direction, rule.clip)


def _read(
    system: MemorySystem, anchor: Weights, weights: Weights, chunks: Mapping[str, Chunk | OneToken], q: Tensor
) -> Tensor:
    """y of the memory that is read out [B, H, C, d], at each token's own weights or at the anchor (eq 90)."""
    if system.read == "chunk":
        return system.architecture.read(q, lambda name, x: x @ weights[name][:, -1].mT)
    last = {name: chunk.select_last(dim=-4) for name, chunk in chunks.items()}
    if system.retention.form == "lq":
        # The accumulated A is read token by token, divided by the anchor's norm.
        scale = {name: system.retention.scale(A[:, -1:]) for name, A in anchor.items()}
        read = system.architecture.read(q.unsqueeze(1), lambda name, x: scale[name] * last[name].read(x))
    else:
        read = system.architecture.read(q.unsqueeze(1), lambda name, x: last[name].read(x))
    return read.squeeze(1)
