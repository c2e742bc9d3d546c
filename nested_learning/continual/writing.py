"""The arithmetic of writing: sums of gradients, the inner rule, the gate, taking over from a faster level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nested_learning.continual.deltas import DOWN, UP, LevelState, Row, Slots
from nested_learning.continual.find import Target, memory_dtype
from nested_learning.continual.level import Level
from nested_learning.continual.rules import resolve_rule

if TYPE_CHECKING:
    from nested_learning.continual.reader import Pairs, Segment

HISTORY = 64  # chunks that a running quantile looks back


@dataclass(frozen=True)
class Write:
    """What happened at a level's boundary.

    Args:
        level: index of the level, 0 is the fastest.
        row: of the batch.
        position: tokens observed at the boundary.
        outcome: "written"; "gated", the chunk was not surprising enough; "masked", it had no token to learn;
            or "dropped", its loss or gradient was NaN or infinite. Only the first changes anything.
        loss: mean next-token loss over the pairs of the chunk that are learned, in nats; 0 if there are none.
        gradient_norm: of the summed gradient, before clipping.
    """

    level: int
    row: int
    position: int
    outcome: str
    loss: float
    gradient_norm: float


class LevelWriter:
    """The arithmetic of one level: its slots, summing, writing, taking over from the faster level.

    Args:
        index: of the level, 0 is the fastest.
        level: settings.
        targets: weights of the level's layers.
        seed: of the initial `down` factors.

    Attributes:
        full_targets, low_rank_targets: one of them is `targets`, the other is empty.
        relayed: slots whose sums come from the next faster level, at its boundaries; see `relay_sums`.
        keys: by slot, the name of the matrix that a gradient is taken for: the full deltas of all levels on
            a weight share one gradient, low-rank factors have their own.
    """

    def __init__(self, index: int, level: Level, targets: Sequence[Target], seed: int) -> None:
        self.index = index
        self.level = level
        self.targets = list(targets)
        self.size = level.chunk_size
        self.rule = resolve_rule(level.rule)
        self.seed = seed
        self.learns = level.lr > 0
        self.full_targets = self.targets if level.rank is None else []
        self.low_rank_targets = [] if level.rank is None else self.targets
        self.keys = {target.name: target.name for target in self.full_targets}
        for target in self.low_rank_targets:
            self._check_rank(target)
            for slot in (target.name + DOWN, target.name + UP):
                self.keys[slot] = f"{index}/{slot}"
        self.relayed: frozenset[str] = frozenset()

    @property
    def full_slots(self) -> set[str]:
        return {target.name for target in self.full_targets}

    def _check_rank(self, target: Target) -> None:
        smaller = min(target.features)
        if self.level.rank is not None and self.level.rank > smaller:
            raise ValueError(
                f"rank {self.level.rank} is larger than {target.name} allows, a matrix of "
                f"{' × '.join(map(str, target.weight.shape))}; expected at most {smaller}"
            )

    def checked(self, slot: str, stored: Tensor) -> Tensor:
        """A tensor of that slot from a file. ValueError if its shape is another's."""
        name = slot.removesuffix(DOWN).removesuffix(UP)
        target = next(target for target in self.targets if target.name == name)
        inputs, outputs = target.features
        factor = {DOWN: (self.level.rank, inputs), UP: (outputs, self.level.rank)}
        expected = factor.get(slot.removeprefix(name), tuple(target.weight.shape))
        if tuple(stored.shape) != expected:
            raise ValueError(f"{slot} has shape {tuple(stored.shape)}, expected {expected}")
        return self.as_memory(stored)

    def as_memory(self, stored: Tensor) -> Tensor:
        """A tensor of a file, which another precision of the model may have written, in this one's."""
        return stored.to(memory_dtype(self.targets[0].weight)) if stored.is_floating_point() else stored

    def factors(self, state: LevelState, target: Target) -> tuple[Tensor, Tensor]:
        """(down [r, in], up [out, r]) of a low-rank delta, made on first use."""
        down, up = state.deltas.get(target.name + DOWN), state.deltas.get(target.name + UP)
        if down is None or up is None:
            down, up = self._initial_factors(target)
            state.deltas[target.name + DOWN], state.deltas[target.name + UP] = down, up
        return down, up

    def _initial_factors(self, target: Target) -> tuple[Tensor, Tensor]:
        rank, (inputs, outputs) = self.level.rank, target.features
        assert rank is not None
        digest = hashlib.sha256(f"{self.seed}/{self.index}/{target.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        weight = target.weight
        random = torch.randn(inputs, rank, generator=generator, dtype=torch.float64)
        down = torch.linalg.qr(random).Q.T.contiguous()
        return (
            down.to(weight.device, memory_dtype(weight)),
            torch.zeros(outputs, rank, dtype=memory_dtype(weight), device=weight.device),
        )

    def own_grads(self, pairs: Pairs, without: frozenset[str]) -> Slots:
        """The gradients by slot instead of by key."""
        wanted = {slot: key for slot, key in self.keys.items() if key in pairs.grads and slot not in without}
        return {slot: pairs.grads[key] for slot, key in wanted.items()}

    def add(self, state: LevelState, grads: Slots, *, last: bool) -> None:
        """Add gradients to the chunk's sums; `last` if the chunk ends with them."""
        if last and not state.sums:  # the chunk was one segment: no need for a copy
            state.sums = dict(grads)
            return
        state.own()
        for slot, g in grads.items():
            if slot in state.sums:
                state.sums[slot].add_(g)
            else:
                state.sums[slot] = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)

    def write(self, state: LevelState) -> tuple[str, float, float]:
        """End the chunk. Returns (outcome, mean loss, gradient norm); see `Write`."""
        sums, pairs, loss = state.sums, state.pairs, state.loss / max(state.pairs, 1)
        state.sums, state.loss, state.pairs = {}, 0.0, 0
        norm = _norm(sums)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return "dropped", loss, norm
        if not pairs:
            return "masked", loss, norm
        if self._is_gated(state, loss):
            return "gated", loss, norm
        state.own()
        if self.level.decay:
            self._decay(state)
        if sums:
            scale = 1.0 if self.level.clip is None else min(1.0, self.level.clip / max(norm, 1e-30))
            state.rule, directions, factor = self.rule.step(state.rule, sums, scale)
            for slot, direction in directions.items():
                self._step(state.deltas, slot, direction, -self.level.lr * factor)
        return "written", loss, norm

    def _is_gated(self, state: LevelState, loss: float) -> bool:
        level, before = self.level, state.history
        if level.gate_quantile is None:
            return level.gate is not None and loss <= level.gate
        state.history = [*before, loss][-HISTORY:]
        if not before:
            return False
        past = torch.tensor(before, dtype=torch.float64)
        return loss <= float(torch.quantile(past, level.gate_quantile))

    def _step(self, deltas: Slots, slot: str, direction: Tensor, step: float) -> None:
        if slot in deltas:
            deltas[slot].add_(direction, alpha=step)
        else:
            deltas[slot] = direction.to(torch.promote_types(direction.dtype, torch.float32)) * step

    def _decay(self, state: LevelState) -> None:
        for slot, delta in state.deltas.items():
            if not slot.endswith(DOWN):  # a product shrinks with one of its factors
                delta.mul_(1 - self.level.decay)

    def take_over(self, state: LevelState, fast: LevelWriter, fast_state: LevelState) -> None:
        """Δ_slow += r·Δ_fast, Δ_fast −= r·Δ_fast, on the weights that both levels have."""
        share = self.level.consolidate
        own = {target.name for target in self.targets}
        state.own()
        fast_state.own()
        for target in fast.targets:
            delta = fast.full_delta(fast_state, target)
            if target.name in own and delta is not None:
                self._step(state.deltas, target.name, delta, share)
                kept = target.name if fast.level.rank is None else target.name + UP
                fast_state.deltas[kept].mul_(1 - share)

    def full_delta(self, state: LevelState, target: Target) -> Tensor | None:
        """Δ of one weight in the weight's own layout; None if it was never written. Not a copy."""
        if self.level.rank is None:
            return state.deltas.get(target.name)
        if target.name + UP not in state.deltas:
            return None
        down, up = self.factors(state, target)
        return (up @ down).T if target.transposed else up @ down


def _norm(grads: Slots) -> float:
    """Frobenius norm over all slots, at least in float32; one host synchronisation."""
    if not grads:
        return 0.0
    tensors = list(grads.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype)
    return float(torch.stack([n.to(norms[0].device) for n in norms]).square().sum().sqrt())


def relay_sums(writers: Sequence[LevelWriter]) -> None:
    """Let slow levels add up the sums of the next faster one instead of every segment's gradients.

    Where the chunk of a level holds whole chunks of the one before, which keeps sums of the same weights,
    those sums are added at that level's boundaries: one pass over them per chunk, not per segment. (The
    fastest level keeps no sums worth the name: its chunk is one segment as a rule.)
    """
    for fast, slow in pairwise(writers[1:]):
        if fast.learns and slow.learns and slow.size % fast.size == 0:
            slow.relayed = frozenset(fast.full_slots & slow.full_slots)


def relay(writers: Sequence[LevelWriter], row: Row, index: int) -> None:
    """Hand the sums of a level on to the next slower one, if that one counts on it."""
    if index + 1 == len(writers) or not writers[index + 1].relayed:
        return
    sums = row.levels[index].sums
    handed = {slot: sums[slot] for slot in writers[index + 1].relayed if slot in sums}
    writers[index + 1].add(row.levels[index + 1], handed, last=False)


def learn_from(writers: Sequence[LevelWriter], row: Row, segment: Segment, row_index: int) -> list[Write]:
    """Let every level take what belongs to its chunk from the segment just read, and write at its boundary.

    A level counts the pairs inside the segment, and the crossing one unless its own chunk begins with the
    segment. The sum of a slow chunk is thus made of gradients at the weights that were in force when its
    tokens were read; nothing is read twice.

    Args:
        writers: one per level, fast to slow, after `relay_sums`.
        row: it has moved past the segment.
        segment: what was read.
        row_index: for the reports.

    Returns:
        the boundaries passed, faster levels first.
    """
    end = row.position
    start = end - len(segment.inside.losses) - 1
    writes = []
    for writer, state in zip(writers, row.levels, strict=True):
        is_last = end % writer.size == 0
        for part in (segment.crossing, segment.inside) if start % writer.size else (segment.inside,):
            state.loss += part.total
            state.pairs += part.learned
            if writer.learns:
                # the pair that crosses a boundary of the faster level is not in what that level relays
                is_relayed = part is segment.inside or start % writers[writer.index - 1].size != 0
                grads = writer.own_grads(part, writer.relayed if is_relayed else frozenset())
                writer.add(state, grads, last=is_last and part is segment.inside)
        if is_last:
            relay(writers, row, writer.index)
            write = Write(writer.index, row_index, end, *writer.write(state))
            writes.append(write)
            if write.outcome == "written" and writer.level.consolidate:
                writer.take_over(state, writers[writer.index - 1], row.levels[writer.index - 1])
    if any(write.outcome == "written" for write in writes):
        row.changed()
    return writes
