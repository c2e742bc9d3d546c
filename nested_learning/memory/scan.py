"""The one scan that every memory layer runs: generate signals, write, read, chunk after chunk.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width. Weights are stacked
[B, N, H, out, in]; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory import check, fused
from nested_learning.memory.architecture import Down, Trace
from nested_learning.memory.description import MatrixRule, MemorySystem
from nested_learning.memory.fused import self_modifying_token
from nested_learning.memory.fused.function import Generic
from nested_learning.memory.objective import AtKey, Dot
from nested_learning.memory.signals import Readouts, Signals, StepInputs, generate_signals
from nested_learning.memory.state import State
from nested_learning.ops.delta_rule.chunk import Chunk, Decay
from nested_learning.ops.norm import clip_norm

Weights = dict[str, Tensor]  # matrix name -> [B, N, H, out, in]


@dataclass(frozen=True)
class MemoryState(State):
    """The state of a running memory layer: a value, every tensor with the batch first.

    Attributes:
        anchor: per matrix [B, N, H, out, in], the weights at each memory's last chunk boundary; gradients
            and generated signals come from them.
        current: the same shape, the weights after the last token.
        momentum: the same shape, None without momentum.
        position: [B] int64, real tokens seen modulo the longer chunk length.
        conv_tail: [B, K−1, 3D] the last inputs of the convolution, None without one.
    """

    anchor: Weights
    current: Weights
    momentum: Weights | None = None
    position: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    conv_tail: Tensor | None = None


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


# Which memories' anchors move to the current weights after the tokens up to a column: all, none, or
# those marked in a mask [B or 1, N].
Boundary = Callable[[int], "bool | Tensor"]


def common_boundaries(system: MemorySystem, device: torch.device) -> Boundary:
    """Boundaries where every row's first token stands in column 0 and none is padded: known to Python."""

    def moved(column: int) -> bool | Tensor:
        here = [system.exact or column % size == 0 for size in system.chunk_sizes]
        return all(here) if len(set(here)) == 1 else _mask(here, device).unsqueeze(0)

    return moved


def row_boundaries(system: MemorySystem, offset: Tensor, end: Tensor) -> Boundary:
    """Boundaries where row b's tokens fill the columns offset_b … end_b − 1 (both [B]).

    Only boundaries that lie among a row's tokens count for it: an earlier one was taken in an earlier
    call, a later one has not come yet.
    """

    def moved(column: int) -> bool | Tensor:
        if system.exact:
            return True
        here = [column % size == 0 for size in system.chunk_sizes]
        if not any(here):
            return False
        passed = (offset < column) & (end >= column)  # [B]
        return passed.unsqueeze(1) & _mask(here, end.device)

    return moved


def _mask(flags: Sequence[bool], device: torch.device) -> Tensor:
    """Flags as a tensor, filled on the device: copying them there would wait for it."""
    return torch.cat([torch.full((1,), flag, dtype=torch.bool, device=device) for flag in flags])


def _move(moved: bool | Tensor, current: Weights, anchor: Weights) -> Weights:
    """The next anchors: `current` where `moved`, `anchor` elsewhere."""
    if isinstance(moved, bool):
        return current if moved else anchor
    where = moved[..., None, None, None]
    return {name: torch.where(where, current[name], anchor[name]) for name in anchor}


def scan(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    boundary: Boundary,
    want_surprise: bool = False,
) -> tuple[Tensor, Tensor | None, RunningWeights]:
    """Run the memories over a sequence, whole chunks fused where there is such a run.

    Args:
        initial: per matrix [N, H, out, in], the meta-learned initial memories (for retention).
        weights: of all memories before the sequence.
        inputs: the same as for one step, over all T columns.
        boundary: where chunks end.

    Returns: y [B, H, T, d], surprise [B, T] or None, and the weights after the sequence.
    """
    whole = _whole_chunks(system, weights, inputs, boundary)
    if not whole:
        return _scan_steps(system, initial, weights, inputs, readouts, boundary, want_surprise)
    first, rest = _cut(inputs, whole)
    y, surprise, current, momentum = fused.run(
        system, initial, weights, first, readouts, want_surprise, _generic(system)
    )
    weights = RunningWeights(current, current, momentum)
    if rest is None:
        return y, surprise, weights
    y_rest, surprise_rest, weights = _scan_steps(
        system, initial, weights, rest, readouts, lambda column: boundary(whole + column), want_surprise
    )
    if surprise is not None and surprise_rest is not None:
        surprise = torch.cat([surprise, surprise_rest], dim=1)
    return torch.cat([y, y_rest], dim=2), surprise, weights


def scan_token(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    moved: bool | Tensor,
    want_surprise: bool,
) -> tuple[Tensor, Tensor | None, RunningWeights]:
    """`scan` over one token; `moved` says which anchors move after it, as `Boundary` does."""
    if readouts is None or not self_modifying_token.supports(system):
        return _scan_steps(system, initial, weights, inputs, readouts, lambda _: moved, want_surprise)
    real = None if inputs.write is None else inputs.write[:, 0]
    y, surprise, current = self_modifying_token.run(
        system, initial, weights.anchor, weights.current, inputs.paths, readouts, real
    )
    after = RunningWeights(_move(moved, current, weights.anchor), current, None)
    return y, surprise if want_surprise else None, after


def _whole_chunks(
    system: MemorySystem, weights: RunningWeights, inputs: StepInputs, boundary: Boundary
) -> int:
    """Leading columns that `fused.run` takes: chunks at whose ends all memories move to their weights."""
    if not fused.supports(system, weights, inputs):
        return 0
    columns, T = 0, inputs.paths["k"].shape[2]
    while columns + system.step <= T and boundary(columns + system.step) is True:
        columns += system.step
    return columns


def _generic(system: MemorySystem) -> Generic:
    """What `fused.run` computes, by the generic step."""

    def run(
        initial: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        momentum: Mapping[str, Tensor] | None,
        inputs: StepInputs,
        readouts: Readouts | None,
    ) -> tuple[Tensor, Weights, Weights | None]:
        W, S = dict(weights), None if momentum is None else dict(momentum)
        start = RunningWeights(W, W, S)
        y, _, after = _scan_steps(system, initial, start, inputs, readouts, lambda _: True, False)
        return y, after.current, after.momentum

    return run


def _scan_steps(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    boundary: Boundary,
    want_surprise: bool,
) -> tuple[Tensor, Tensor | None, RunningWeights]:
    """`scan` by the generic step."""
    column, checked = 0, check.enabled()
    y, surprise = [], []
    for index, piece in enumerate(_split(inputs, system.step)):
        out = step(system, initial, weights, piece, readouts, want_surprise)
        if checked:
            moved = {**out.current, **{f"the momentum of {n}": S for n, S in (out.momentum or {}).items()}}
            check.check_step(system.memories, index, {"y": out.y}, moved)
        column += piece.paths["k"].shape[2]
        anchor = _move(boundary(column), out.current, weights.anchor)
        weights = RunningWeights(anchor, out.current, out.momentum)
        y.append(out.y)
        surprise.append(out.surprise)
    joined = torch.cat([s for s in surprise if s is not None], dim=1) if want_surprise else None
    return torch.cat(y, dim=2), joined, weights


def _cut(inputs: StepInputs, columns: int) -> tuple[StepInputs, StepInputs | None]:
    """The inputs of the first `columns` tokens and of the others; a mask does not occur."""
    T = inputs.paths["k"].shape[2]
    if columns == T:
        return inputs, None
    sizes = [columns, T - columns]
    paths = {name: x.split(sizes, dim=2) for name, x in inputs.paths.items()}
    gates = (None, None) if inputs.gates is None else inputs.gates.split(sizes, dim=3)
    first, rest = (StepInputs({n: p[i] for n, p in paths.items()}, gates[i], None) for i in (0, 1))
    return first, rest


def _split(inputs: StepInputs, size: int) -> Sequence[StepInputs]:
    """Cut along the tokens. `split`, not slices: its backward is one cat, not a sum of padded parts."""
    paths = {name: x.split(size, dim=2) for name, x in inputs.paths.items()}
    count = len(paths["k"])
    gates = (None,) * count if inputs.gates is None else inputs.gates.split(size, dim=3)
    write = (None,) * count if inputs.write is None else inputs.write.split(size, dim=1)
    return [StepInputs({n: paths[n][i] for n in paths}, gates[i], write[i]) for i in range(count)]
