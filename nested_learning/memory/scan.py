"""The one scan that every memory layer runs: generate signals, write, read, chunk after chunk.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width. Weights are stacked
[B, N, H, out, in]; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory import fused
from nested_learning.memory.architecture import Evaluation
from nested_learning.memory.description import MemorySystem
from nested_learning.memory.state import State
from nested_learning.ops.delta_rule.chunk import Chunk, Decay
from nested_learning.ops.norm import clip_norm

Weights = dict[str, Tensor]  # matrix name -> [B, N, H, out, in]

# The input path that each generating memory reads (spec section 3, "Paths").
PATH_OF = {"k": "k", "v": "v", "q": "q", "eta": "k", "alpha": "k"}
# The generating memory whose output each gate is read from.
SOURCE_OF_GATE = {"eta": "eta", "alpha": "alpha", "mu": "eta"}


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


class Signals(NamedTuple):
    """What drives the writes and reads of one step; [B, H, C, d] or [B, H, C]."""

    k: Tensor
    v: Tensor
    q: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_mu: Tensor | None


class Readouts(NamedTuple):
    """Vectors that turn a generating memory's output into a gate: [gates, H, d] and [gates, H]."""

    weight: Tensor
    bias: Tensor


class StepInputs(NamedTuple):
    """The inputs of one step."""

    paths: Mapping[str, Tensor]  # "k", "v", "q": [B, H, C, d], unit-norm
    gates: Tensor | None  # [gates, B, H, C] logits where gates are static projections
    write: Tensor | None  # [B, C] True = real token; None: all are


class RunningWeights(NamedTuple):
    """The weights of all memories while they run."""

    anchor: Weights
    current: Weights
    momentum: Weights | None


class StepOutputs(NamedTuple):
    y: Tensor  # [B, H, C, d]
    surprise: Tensor | None  # [B, C]
    current: Weights
    momentum: Weights | None


def generate_signals(
    system: MemorySystem, anchor: Mapping[str, Tensor], inputs: StepInputs, readouts: Readouts | None
) -> Signals:
    """k, v, q and the gates of one step: outputs of the generating memories, or static projections.

    A generated vector, like a generated target, is bounded to norm 1, not normalised to it. A memory that
    makes its own keys feeds back on itself from chunk to chunk: what it learned moves the key, which moves
    what it learns. Normalising a short M(x) amplifies that by 1/‖M(x)‖, enough for the outer gradient to grow
    a hundredfold within a few chunks; scaling down only never amplifies (docs/log.md, 2026-11-23).
    """
    vectors, logits = dict(inputs.paths), inputs.gates
    if system.generated:
        generated = dict(zip(system.generated, _generate(system, anchor, inputs.paths), strict=True))
        for name in ("k", "v", "q"):
            if name in generated:
                vectors[name] = clip_norm(generated[name])
        if readouts is not None:
            sources = [generated[SOURCE_OF_GATE[gate]] for gate in system.gates]
            per_gate = [(s * w.unsqueeze(1)).sum(-1) for s, w in zip(sources, readouts.weight, strict=True)]
            logits = torch.stack(per_gate) + readouts.bias[:, None, :, None]
    assert logits is not None  # either generated or static, by construction of the layer
    eta = system.eta_max * torch.sigmoid(logits[0])
    log_decays = F.logsigmoid(logits[1:])  # in log space from end to end: log(sigmoid) underflows to -inf
    if inputs.write is not None:
        # a padded token neither erases, nor writes, nor decays anything
        real = inputs.write.unsqueeze(1).to(eta.dtype)
        eta, log_decays = eta * real, log_decays * real
    return Signals(
        vectors["k"],
        vectors["v"],
        vectors["q"],
        eta,
        log_decays[0],
        log_decays[1] if system.momentum else None,
    )


def _generate(
    system: MemorySystem, anchor: Mapping[str, Tensor], paths: Mapping[str, Tensor]
) -> Sequence[Tensor]:
    """The generating memories' outputs, each [B, H, C, d].

    The memory that is read out runs along and its answer is dropped: leaving it out would cut the stacked
    weights, and copying those costs more than the product.
    """
    x = torch.stack([paths[PATH_OF[name]] for name in (*system.generated, "q")], dim=1)
    return system.architecture.read(x, lambda name, x: x @ anchor[name].mT).unbind(1)[:-1]


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
    exactly, by the delta-rule recurrence (spec section 4).
    """
    anchor, current, momentum = weights
    signals = generate_signals(system, anchor, inputs, readouts)
    key, residual, at_key = _keys_and_residuals(system, anchor, signals)
    writes = system.architecture.writes(key, residual, at_key, anchor, system.rule)

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
    chunks = {
        name: Chunk(
            current[name],
            w.x,
            rate.unsqueeze(-1) * w.direction,
            decay,
            erase=eta if system.rule[name].erase else None,
            S=None if momentum is None else momentum[name],
            mu=momentum_decay,
            write=write,
            W_init=initial[name] if system.rule[name].retain == "initial" else None,
            Wx=w.answer if current is anchor else None,
        )
        for name, w in writes.items()
    }
    y = _read(system, anchor, chunks, signals.q)
    surprise = None
    if want_surprise:
        error = (at_key.answer - residual)[:, -1].detach()  # [B, H, C, d] of the memory that is read out
        surprise = error.square().sum((1, 3)).sqrt()
    final = {name: chunk.final() for name, chunk in chunks.items()}
    return StepOutputs(
        y,
        surprise,
        {name: W for name, (W, _) in final.items()},
        {name: S for name, (_, S) in final.items() if S is not None} if system.momentum else None,
    )


def _keys_and_residuals(
    system: MemorySystem, anchor: Weights, signals: Signals
) -> tuple[Tensor, Tensor, Evaluation]:
    """k [B, 1, H, C, d], v̂ − k and the answers to k of all memories, from one pass over [v; k]."""
    key, value = signals.k.unsqueeze(1), signals.v.unsqueeze(1)
    if not system.self_targets:
        return key, value - key, system.architecture.evaluate(key, anchor)
    both = system.architecture.evaluate(torch.cat([value, key], dim=-2), anchor)
    at_value, at_key = both.halves()
    return key, clip_norm(value + at_value.answer) - key, at_key


def _read(system: MemorySystem, anchor: Weights, chunks: Mapping[str, Chunk], q: Tensor) -> Tensor:
    """y of the memory that is read out [B, H, C, d]: at each token's own weights, or at the anchor."""
    if system.read == "chunk":
        return system.architecture.read(q, lambda name, x: x @ anchor[name][:, -1].mT)
    last = {name: chunk.select_last(dim=-4) for name, chunk in chunks.items()}
    return system.architecture.read(q.unsqueeze(1), lambda name, x: last[name].read(x)).squeeze(1)


# Which memories' anchors move to the current weights after the tokens up to a column: all, none, or
# those marked in a mask [B or 1, N].
Boundary = Callable[[int], "bool | Tensor"]


def common_boundaries(system: MemorySystem, device: torch.device) -> Boundary:
    """Boundaries where every row's first token stands in column 0 and none is padded: known to Python."""

    def moved(column: int) -> bool | Tensor:
        here = [column % size == 0 for size in system.chunk_sizes]
        return all(here) if len(set(here)) == 1 else _mask(here, device).unsqueeze(0)

    return moved


def row_boundaries(system: MemorySystem, offset: Tensor, end: Tensor) -> Boundary:
    """Boundaries where row b's tokens fill the columns offset_b … end_b − 1 (both [B]).

    Only boundaries that lie among a row's tokens count for it: an earlier one was taken in an earlier
    call, a later one has not come yet.
    """

    def moved(column: int) -> bool | Tensor:
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
    """Run the memories over a sequence.

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
    assert readouts is not None  # fused.supports systems whose gates are generated
    first, rest = _cut(inputs, whole)
    y, surprise, current = fused.run(
        system, initial, weights, first, readouts, want_surprise, _reference(system, initial)
    )
    weights = RunningWeights(current, current, None)
    if rest is None:
        return y, surprise, weights
    y_rest, surprise_rest, weights = _scan_steps(
        system, initial, weights, rest, readouts, lambda column: boundary(whole + column), want_surprise
    )
    if surprise is not None and surprise_rest is not None:
        surprise = torch.cat([surprise, surprise_rest], dim=1)
    return torch.cat([y, y_rest], dim=2), surprise, weights


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


def _reference(system: MemorySystem, initial: Mapping[str, Tensor]) -> fused.Reference:
    """What `fused.run` computes, by the generic step."""

    def reference(
        W1: Tensor, W2: Tensor, W2_init: Tensor, k: Tensor, v: Tensor, q: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        start = {"W1": W1, "W2": W2}
        y, _, after = _scan_steps(
            system,
            {**initial, "W2": W2_init},
            RunningWeights(start, start, None),
            StepInputs({"k": k, "v": v, "q": q}, None, None),
            Readouts(weight, bias),
            lambda _: True,
            want_surprise=False,
        )
        return y, after.current["W1"], after.current["W2"]

    return reference


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
    column = 0
    y, surprise = [], []
    for piece in _split(inputs, system.step):
        out = step(system, initial, weights, piece, readouts, want_surprise)
        column += piece.paths["k"].shape[2]
        anchor = _move(boundary(column), out.current, weights.anchor)
        weights = RunningWeights(anchor, out.current, out.momentum)
        y.append(out.y)
        surprise.append(out.surprise)
    joined = torch.cat([s for s in surprise if s is not None], dim=1) if want_surprise else None
    return torch.cat(y, dim=2), joined, weights


def _cut(inputs: StepInputs, columns: int) -> tuple[StepInputs, StepInputs | None]:
    """The inputs of the first `columns` tokens and of the others; static gates and masks do not occur."""
    if columns == inputs.paths["k"].shape[2]:
        return inputs, None
    parts = {name: x.tensor_split([columns], dim=2) for name, x in inputs.paths.items()}
    first, rest = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
    return StepInputs(first, None, None), StepInputs(rest, None, None)


def _split(inputs: StepInputs, size: int) -> Sequence[StepInputs]:
    """Cut along the tokens. `split`, not slices: its backward is one cat, not a sum of padded parts."""
    paths = {name: x.split(size, dim=2) for name, x in inputs.paths.items()}
    count = len(paths["k"])
    gates = (None,) * count if inputs.gates is None else inputs.gates.split(size, dim=3)
    write = (None,) * count if inputs.write is None else inputs.write.split(size, dim=1)
    return [StepInputs({n: paths[n][i] for n in paths}, gates[i], write[i]) for i in range(count)]
