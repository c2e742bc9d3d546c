"""The arithmetic of writing: sums of gradients, the inner rule, the gate, taking over from a faster level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row
from nested_learning.continual.find import Target, memory_dtype
from nested_learning.continual.lesson import Lesson
from nested_learning.continual.level import Level
from nested_learning.continual.rules import resolve_rule
from nested_learning.memory.state import Weights
from nested_learning.ops.norm import magnitude

HISTORY = 64  # chunks that a running quantile looks back


@dataclass(frozen=True)
class Write:
    """Report of a level's boundary.

    Args:
        level: index of the level, 0 is the fastest.
        row: index of the row.
        position: number of tokens observed at the boundary.
        outcome: "written"; "gated", the chunk was not surprising enough; "masked", it had no token to learn;
            or "dropped", its loss or gradient was NaN or infinite. Only the first changes anything.
        loss: mean next-token loss over the pairs of the chunk that are learned, in nats; 0 if there are none.
        gradient_norm: Frobenius norm of the summed gradient, before clipping.
    """

    level: int
    row: int
    position: int
    outcome: str
    loss: float
    gradient_norm: float


class DeltaWriter:
    """The arithmetic of one level's delta: summing gradients, writing, taking over from the faster level.

    Args:
        index: index of the level, 0 is the fastest.
        level: settings.
        targets: weights of the level's layers.
        seed: seed of the initial `down` factors.
        faster: writer of the next faster level; None for the fastest.

    Attributes:
        learns: whether the level learns from text.
        full_targets, low_rank_targets: one of them is `targets`, the other is empty.
        keys: by slot, the name of the matrix that a gradient is taken for: the full deltas of all levels on
            a weight share one gradient, low-rank factors have their own.
        relayed: slots whose sums are those of the faster level, added at its boundaries. So it is where the
            level's chunk holds whole chunks of the faster one, which keeps sums of the same weights: one
            pass over them per chunk, not per segment. (The fastest level keeps no sums worth the name: its
            chunk is one segment as a rule.)
        direct: all other slots.
    """

    def __init__(
        self,
        index: int,
        level: Level,
        targets: Sequence[Target],
        seed: int,
        faster: DeltaWriter | None = None,
    ) -> None:
        self.index = index
        self.level = level
        self.targets = list(targets)
        self.rule = resolve_rule(level.rule)
        self.seed = seed
        self.faster = faster
        self.learns = level.lr > 0
        self.full_targets = self.targets if level.rank is None else []
        self.low_rank_targets = [] if level.rank is None else self.targets
        self.keys = {target.name: target.name for target in self.full_targets}
        for target in self.low_rank_targets:
            self._check_rank(target)
            for slot in (target.name + DOWN, target.name + UP):
                self.keys[slot] = f"{index}/{slot}"
        self.relayed: frozenset[str] = frozenset()
        both_sum = faster is not None and faster.index > 0 and faster.learns and self.learns
        if faster is not None and both_sum and level.chunk_size % faster.level.chunk_size == 0:
            self.relayed = frozenset({t.name for t in faster.full_targets} & self.keys.keys())
        self.direct = frozenset(self.keys) - self.relayed

    def _check_rank(self, target: Target) -> None:
        smaller = min(target.features)
        if self.level.rank is not None and self.level.rank > smaller:
            raise ValueError(
                f"rank {self.level.rank} is larger than {target.name} allows, a matrix of "
                f"{' × '.join(map(str, target.shape))}; expected at most {smaller}"
            )

    def shape(self, slot: str) -> tuple[int | None, ...]:
        """Shape of a slot's matrix."""
        name = slot.removesuffix(DOWN).removesuffix(UP)
        target = next(target for target in self.targets if target.name == name)
        inputs, outputs = target.features
        factors = {DOWN: (self.level.rank, inputs), UP: (outputs, self.level.rank)}
        own = factors.get(slot.removeprefix(name))
        return target.shape if own is None else (*target.stack, *own)

    def factors(self, state: DeltaState, target: Target) -> tuple[Tensor, Tensor]:
        """(down [r, in], up [out, r]) of a low-rank delta, made on first use; of stacked experts a stack of
        each."""
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
        random = torch.randn(*target.stack, inputs, rank, generator=generator, dtype=torch.float64)
        down = torch.linalg.qr(random).Q.mT.contiguous()
        return (
            down.to(weight.device, memory_dtype(weight)),
            torch.zeros(*target.stack, outputs, rank, dtype=memory_dtype(weight), device=weight.device),
        )

    def add(self, state: DeltaState, grads: Weights, slots: Collection[str], *, last: bool = False) -> None:
        """Add the gradients (by key) of some slots to the chunk's sums; `last` if they end the chunk."""
        new = {slot: grads[key] for slot, key in self.keys.items() if slot in slots and key in grads}
        if not new:
            return
        if last and not state.sums:  # the chunk was one segment: no need for a copy
            state.sums = new
            return
        state.own()
        for slot, g in new.items():
            if slot in state.sums:
                state.sums[slot].add_(g)
            else:
                state.sums[slot] = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)

    def write(self, state: DeltaState) -> tuple[str, float, float]:
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
        for slot, delta in state.deltas.items() if self.level.decay else ():
            if not slot.endswith(DOWN):  # a product shrinks with one of its factors
                delta.mul_(1 - self.level.decay)
        if sums:
            scale = 1.0 if self.level.clip is None else min(1.0, self.level.clip / max(norm, 1e-30))
            directions, state.rule, factor = self.rule.step(state.rule, sums, scale)
            for slot, direction in directions.items():
                _step(state.deltas, slot, direction, -self.level.lr * factor)  # eq 71
        return "written", loss, norm

    def _is_gated(self, state: DeltaState, loss: float) -> bool:
        level, before = self.level, state.history
        if level.gate_quantile is None:
            return level.gate is not None and loss <= level.gate
        state.history = [*before, loss][-HISTORY:]
        if not before:
            return False
        past = torch.tensor(before, dtype=torch.float64)
        return loss <= float(torch.quantile(past, level.gate_quantile))

    def take_over(self, state: DeltaState, fast: DeltaWriter, fast_state: DeltaState) -> None:
        """Δ_slow += r·Δ_fast, Δ_fast −= r·Δ_fast, on the weights that both levels have."""
        share = self.level.consolidate
        own = {target.name for target in self.targets}
        state.own()
        fast_state.own()
        for target in fast.targets:
            delta = fast.full_delta(fast_state, target)
            if target.name in own and delta is not None:
                _step(state.deltas, target.name, delta, share)
                kept = target.name if fast.level.rank is None else target.name + UP
                fast_state.deltas[kept].mul_(1 - share)

    def full_delta(self, state: DeltaState, target: Target) -> Tensor | None:
        """Δ of one weight in the weight's own layout; None if it was never written. Not a copy."""
        if self.level.rank is None:
            return state.deltas.get(target.name)
        if target.name + UP not in state.deltas:
            return None
        down, up = self.factors(state, target)
        return (up @ down).mT if target.transposed else up @ down


def _step(deltas: Weights, slot: str, direction: Tensor, step: float) -> None:
    """Δ ← Δ + step · direction, where a slot without an entry has Δ = 0."""
    if slot in deltas:
        deltas[slot].add_(direction, alpha=step)
    else:
        deltas[slot] = direction.to(torch.promote_types(direction.dtype, torch.float32)) * step


def _norm(grads: Weights) -> float:
    """Frobenius norm over all slots, at least in float32; one host synchronisation."""
    if not grads:
        return 0.0
    tensors = list(grads.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 2, dtype)
    norm = float(torch.stack([n.to(norms[0].device) for n in norms]).square().sum().sqrt())
    if 1e-15 < norm < math.inf or math.isnan(norm):
        return norm
    units = [magnitude(g) for g in tensors]  # the squares may have left float32
    found = [s * (g / s).to(dtype).norm() for g, s in zip(tensors, units, strict=True)]
    return math.hypot(*(float(n) for n in found))


def relay(writers: Sequence[DeltaWriter], row: Row, index: int) -> None:
    """Hand the sums of a level on to the next slower one, if that one counts on it."""
    for slower in writers[index + 1 : index + 2]:
        slower.add(row.levels[slower.index], row.levels[index].sums, slower.relayed)


def learn_from(writers: Sequence[DeltaWriter], row: Row, lesson: Lesson, row_index: int) -> list[Write]:
    """Let every level take what belongs to its chunk from the segment just read, and write at its boundary.

    A level counts the pairs inside the segment, and the crossing one unless its own chunk begins with the
    segment. The sum of a slow chunk is thus made of gradients at the weights that were in force when its
    tokens were read; nothing is read twice.

    Args:
        writers: one per level, fast to slow.
        row: the row, which has moved past the segment.
        lesson: what the segment taught.
        row_index: index of the row, for the reports.

    Returns:
        the boundaries passed, faster levels first.
    """
    end = row.position
    writes = []
    for writer, state in zip(writers, row.levels, strict=True):
        size, faster = writer.level.chunk_size, writer.faster
        is_last = end % size == 0
        for pairs in (lesson.crossing, lesson.inside) if lesson.start % size else (lesson.inside,):
            state.loss += pairs.loss
            state.pairs += pairs.count
            if writer.learns:
                slots: Collection[str] = writer.direct
                if faster and pairs is lesson.crossing and lesson.start % faster.level.chunk_size == 0:
                    # the pair that crosses a boundary of the faster level is not in what that level relays
                    slots = writer.keys
                writer.add(state, pairs.grads, slots, last=is_last and pairs is lesson.inside)
        if is_last:
            relay(writers, row, writer.index)
            write = Write(writer.index, row_index, end, *writer.write(state))
            writes.append(write)
            if faster and write.outcome == "written" and writer.level.consolidate:
                writer.take_over(state, faster, row.levels[faster.index])
    if any(write.outcome == "written" for write in writes):
        row.mark_changed()
    return writes
