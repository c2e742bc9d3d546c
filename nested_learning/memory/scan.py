"""The one scan that every memory layer runs: generate signals, write, read, chunk after chunk.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width. Weights are stacked
[B, N, H, out, in]; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nested_learning.memory import check
from nested_learning.memory.compiled import compiled_step
from nested_learning.memory.description import MemorySystem
from nested_learning.memory.engines import chunked
from nested_learning.memory.fused import self_modifying_token
from nested_learning.memory.signals import Readouts, StepInputs
from nested_learning.memory.state import State
from nested_learning.memory.step import RunningWeights, Weights, step
from nested_learning.ops.blocks import traced


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
    compiled: bool = False,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, RunningWeights]:
    """Run the memories over a sequence, whole chunks by the chunk algebra where it covers them.

    Args:
        initial: per matrix [N, H, out, in], the meta-learned initial memories (for retention).
        weights: of all memories before the sequence.
        inputs: the same as for one step, over all T columns.
        boundary: where chunks end.
        compiled: run the generic step through torch.compile.
        operands: dtype of the factors of products in the chunk algebra; None for that of the weights.

    Returns: y [B, H, T, d], surprise [B, T] or None, and the weights after the sequence.
    """
    whole = _whole_chunks(system, weights, inputs, boundary)
    if not whole:
        return _scan_steps(system, initial, weights, inputs, readouts, boundary, want_surprise, compiled)
    first, rest = _cut(inputs, whole)
    y, weights, surprise = chunked.run(
        system, initial, weights, first, readouts, want_surprise, _generic(system), operands
    )
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
    """Leading columns that `chunked.run` takes: chunks at whose ends all memories move to their weights."""
    covered = chunked.covers(system) and weights.at_anchor and inputs.write is None
    if not covered or check.enabled() or traced():  # the checks look at every chunk
        return 0
    columns, T = 0, inputs.paths["k"].shape[2]
    while columns + system.step <= T and boundary(columns + system.step) is True:
        columns += system.step
    return columns


def _generic(system: MemorySystem) -> chunked.Generic:
    """What `chunked.run` computes, by the generic step."""

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
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None, RunningWeights]:
    """`scan` by the generic step."""
    column, checked = 0, check.enabled()
    run = compiled_step if compiled else step
    y, surprise = [], []
    for index, piece in enumerate(_split(inputs, system.step)):
        out = run(system, initial, weights, piece, readouts, want_surprise)
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
