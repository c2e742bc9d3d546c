"""The arithmetic of writing: sums of gradients, the inner rule, the gate, taking over from a faster level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nested_learning.continual.averages import LowRank, approach, mix_in, relative
from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row, product
from nested_learning.continual.find import Target, memory_dtype
from nested_learning.continual.lesson import Lesson, Replayed
from nested_learning.continual.level import Level
from nested_learning.continual.rules import resolve_rule
from nested_learning.continual.starts.starts import LevelStart, check_tensors, start_values
from nested_learning.continual.units import SparseDelta, SparseWrites
from nested_learning.memory.state import Weights
from nested_learning.ops.context import full_precision
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
        truncation: of an average at a rank, or a level at a rank that takes over, the Frobenius norm of what
            the rank could not hold, relative to that of the whole; 0 where nothing is cut off.
        replayed: number of learned tokens of kept examples in the summed gradient.
        reread: how often the chunk had been read again for this write; 0 for the write that every chunk has.
    """

    level: int
    row: int
    position: int
    outcome: str
    loss: float
    gradient_norm: float
    truncation: float = 0.0
    replayed: int = 0
    reread: int = 0

    @property
    def complaint(self) -> str:
        """The complaint about a write that was dropped."""
        reading = f"re-reading {self.reread} of " if self.reread else ""
        return (
            f"level {self.level} learned nothing from {reading}the chunk that ends at token {self.position} "
            f"of row {self.row}: its loss is {self.loss}, its gradient norm {self.gradient_norm}"
        )


class DeltaWriter:
    """The arithmetic of one level's delta: summing gradients, writing, taking over from the faster level.

    Args:
        index: index of the level, 0 is the fastest.
        level: settings.
        targets: weights of the level's layers.
        seed: seed of the initial `down` factors.
        faster: writer of the next faster level that is no average; None for the fastest.
        averaged: writer of the level that this one averages; None if it is no average.
        fisher: scale of the decay for each weight, by the targets' names; None for 1.
        start: learned rates and start of the level; None for those of its settings, and zero.

    Attributes:
        devices: devices of the weights by name when the level was made; the memory stays there.
        number: number of faster levels that are no averages.
        sparse: writes to a few hidden units; None where all weights are written.
        fixed_down: whether `down` stays as drawn, in this level or in the one that it averages.
        learns: whether the level learns from text.
        full_targets, low_rank_targets: one of them is `targets`, the other is empty.
        keys: by slot, the name of the matrix that a gradient is taken for: the full deltas of all levels on
            a weight share one gradient, low-rank factors have their own.
        relayed: slots whose sums are those of the faster level, added at its boundaries. So it is where the
            level's chunk holds whole chunks of the faster one, which keeps sums of the same weights: one
            pass over them per chunk, not per segment. (The fastest level keeps no sums worth the name: its
            chunk is one segment as a rule.)
        direct: all other slots.
        rates: factor of the level's `lr` by slot; 1 where there is none.
        begin: state of a row that has read nothing, never written to.
    """

    def __init__(
        self,
        index: int,
        level: Level,
        targets: Sequence[Target],
        seed: int,
        faster: DeltaWriter | None = None,
        averaged: DeltaWriter | None = None,
        fisher: Weights | None = None,
        start: LevelStart | None = None,
    ) -> None:
        self.index = index
        self.number: int = 0 if faster is None else faster.number + 1
        self.level = level
        self.targets = list(targets)
        self.averaged = averaged
        if averaged is not None:
            self.targets = self._common(averaged, f"averages level {averaged.index}")
        if level.consolidate and faster is not None:
            self._common(faster, f"takes over from level {faster.index} (consolidate={level.consolidate})")
        self.devices = {target.name: target.weight.device for target in self.targets}
        self._by_name = {target.name: target for target in self.targets}
        self.rule = resolve_rule(level.rule)
        self.seed = seed
        self.faster = faster
        self.fisher = self._checked_fisher(fisher or {}) if level.decay else {}
        self.learns = level.lr > 0
        self.full_targets = self.targets if level.rank is None else []
        self.low_rank_targets = [] if level.rank is None else self.targets
        self.fixed_down = level.rank is not None and not level.learn_down
        if averaged is not None and averaged.fixed_down:
            self.fixed_down = level.rank == averaged.level.rank
        fraction = level.sparse if averaged is None else averaged.level.sparse
        self.sparse = None if fraction is None else SparseWrites(fraction, self.targets, self.rule)
        self.keys = {target.name: target.name for target in self.full_targets}
        for target in self.low_rank_targets:
            self._check_rank(target)
            for slot in (target.name + DOWN, target.name + UP)[self.fixed_down :]:
                self.keys[slot] = f"{index}/{slot}"
        self.relayed: frozenset[str] = frozenset()
        both_sum = faster is not None and faster.index > 0 and faster.learns and self.learns
        if faster is not None and both_sum and level.chunk_size % faster.level.chunk_size == 0:
            self.relayed = frozenset({t.name for t in faster.full_targets} & self.keys.keys())
        self.direct = frozenset(self.keys) - self.relayed
        self.rates = {} if start is None else dict(start.rates)
        self.begin = self._beginning(start or LevelStart())

    def _common(self, other: DeltaWriter, does: str) -> list[Target]:
        """Targets of this level that another one has too. ValueError where there are none for what it `does`
        with that one."""
        known = {target.name for target in other.targets}
        found = [target for target in self.targets if target.name in known]
        if not found:
            raise ValueError(
                f"level {self.index} {does}, but their layers have no weight in common: "
                f"{self.level.layers!r} and {other.level.layers!r}"
            )
        return found

    def new_state(self) -> DeltaState:
        """State of the level in a row that has read nothing."""
        return self.begin.share()

    def _beginning(self, start: LevelStart) -> DeltaState:
        """State of a level that begins at its start; of an average, at that of the level it averages."""
        if self.averaged is not None:
            begin = self.averaged.begin
            if begin.deltas and self.sparse is None:
                self.average(found := DeltaState(), self.averaged, begin, rate=1.0)
                return found
            return DeltaState()
        if start.tensors and (self.sparse is not None or not self.learns):
            what = f"sparse={self.level.sparse}" if self.learns else "lr=0"
            raise ValueError(f"level {self.index} has {what}, and starts have a matrix for it; expected none")
        slots = list(self.keys) if self.learns else []
        check_tensors(start, self.targets, self.shape, slots, self.level.rank is not None)
        weight = self.targets[0].weight
        placed = {name: t.to(weight.device, memory_dtype(weight)) for name, t in start.tensors.items()}
        values = start_values(placed, self.targets, self.level.rank is None)
        down = [name for name in values if self.fixed_down and name.endswith(DOWN)]
        return DeltaState(drawn={name: values.pop(name) for name in down}, deltas=values)

    def _checked_fisher(self, fisher: Weights) -> Weights:
        """Fisher's numbers of the targets on their devices."""
        for target in self.targets if fisher else ():
            found = fisher.get(target.name)
            if found is None or found.shape != target.weight.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(
                    f"the level learns {target.name} of shape {tuple(target.weight.shape)}, where fisher has "
                    f"{shape}; make it of the same model and modules: Fisher.of(model, …, modules=…)"
                )
        return {t.name: fisher[t.name].to(t.weight.device) for t in self.targets if fisher}

    def _check_rank(self, target: Target) -> None:
        smaller = min(target.features)
        if self.level.rank is not None and self.level.rank > smaller:
            raise ValueError(
                f"rank {self.level.rank} is larger than {target.name} allows, a matrix of "
                f"{' × '.join(map(str, target.shape))}; expected at most {smaller}"
            )

    def shape(self, slot: str) -> tuple[int | None, ...]:
        """Shape of a slot's matrix: of a full one that of the weight, also where rows of it are kept."""
        name = slot.removesuffix(DOWN).removesuffix(UP)
        target = self._by_name[name]
        inputs, outputs = target.features
        factors = {DOWN: (self.level.rank, inputs), UP: (outputs, self.level.rank)}
        own = factors.get(slot.removeprefix(name))
        return target.shape if own is None else (*target.stack, *own)

    def factors(self, state: DeltaState, target: Target) -> tuple[Tensor, Tensor]:
        """(down [r, in], up [out, r]) of a low-rank delta, made on first use; of stacked experts a stack of
        each."""
        kept = state.drawn if self.fixed_down else state.deltas
        down, up = kept.get(target.name + DOWN), state.deltas.get(target.name + UP)
        if down is None or up is None:
            drawn, up = self.initial_factors(target, self.level.rank or 0)
            down = kept.setdefault(target.name + DOWN, drawn)
            state.deltas[target.name + UP] = up
        return down, up

    def initial_factors(self, target: Target, rank: int) -> tuple[Tensor, Tensor]:
        """(down, up) of a delta of zero at a rank: `down` drawn with orthonormal rows, `up` zero."""
        inputs, outputs = target.features
        digest = hashlib.sha256(f"{self.seed}/{self.number}/{target.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
        weight = target.weight
        size = (*target.stack, inputs, rank)
        random = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        down = torch.linalg.qr(random).Q.mT.contiguous()
        return (
            down.to(weight.device, memory_dtype(weight)),
            torch.zeros(*target.stack, outputs, rank, dtype=memory_dtype(weight), device=weight.device),
        )

    def by_slot(self, grads: Weights) -> Weights:
        """Gradients by slot, of those by key that there are."""
        return {slot: grads[key] for slot, key in self.keys.items() if key in grads}

    def add(self, state: DeltaState, grads: Weights, slots: Collection[str], *, last: bool = False) -> None:
        """Add the gradients (by key) of some slots to the chunk's sums; `last` if they end the chunk."""
        new = {slot: g for slot, g in self.by_slot(grads).items() if slot in slots}
        if not new:
            return
        if last and not state.sums:  # the chunk was one segment: no need for a copy
            state.sums = new
            return
        state.own()
        accumulate(state.sums, new)

    def replay(self, state: DeltaState, grads: Weights) -> None:
        """Add gradients (by key) of kept examples. The sums may be tensors that other levels have as well."""
        state.sums = _total(state.sums, self.by_slot(grads))

    def write(
        self, state: DeltaState, pull: Weights | None = None, *, again: bool = False
    ) -> tuple[str, float, float]:
        """End the chunk, or its re-reading (`again`), which is not gated and forgets nothing.

        Args:
            state: state of the level.
            pull: further gradients by slot, which count where the chunk has something to learn.
            again: whether this is a re-reading.

        Returns:
            (outcome, mean loss, gradient norm); see `Write`.
        """
        sums, pairs, loss = state.sums, state.pairs, state.loss / max(state.pairs, 1)
        distilled = bool(state.distilled)
        for more in (state.distilled, pull if pull and (pairs or distilled) else {}):
            sums = _total(sums, more)
        state.sums, state.distilled, state.loss, state.pairs = {}, {}, 0.0, 0
        norm = _norm(sums)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return "dropped", loss, norm
        if not pairs and not distilled:
            return "masked", loss, norm
        if pairs and not again and self.is_gated(state, loss):
            return "gated", loss, norm
        state.own()
        for slot, delta in state.deltas.items() if self.level.decay and not again else ():
            if not slot.endswith(DOWN):  # a product shrinks with one of its factors
                delta.mul_(self.kept_share(slot, delta.dtype))
        if sums:
            chosen = None if self.sparse is None else self.sparse.choose(state, sums)
            grads, size = (sums, norm) if chosen is None else (chosen.grads, _norm(chosen.grads))
            scale = 1.0 if self.level.clip is None else min(1.0, self.level.clip / max(size, 1e-30))
            before = state.rule if chosen is None else chosen.rule
            with full_precision(next(iter(grads.values())).device):
                directions, rule, factor = self.rule.step(before, grads, scale)
            if self.sparse is not None and chosen is not None:
                steps = {slot: self._step_size(slot, factor) for slot in directions}
                self.sparse.put(state, chosen, directions, steps, rule)
                return "written", loss, norm
            state.rule = rule
            for slot, direction in directions.items():
                _step(state.deltas, slot, direction, self._step_size(slot, factor))  # eq 71
        return "written", loss, norm

    def _step_size(self, slot: str, factor: float) -> float:
        """What a slot's direction is multiplied by: −lr · r, and the rule's factor."""
        return -self.level.lr * factor * self.rates.get(slot, 1.0)

    def kept_share(self, slot: str, dtype: torch.dtype) -> float | Tensor:
        """Share of a delta that is not forgotten at a write."""
        if slot not in self.fisher:
            return 1 - self.level.decay
        return 1 - (self.fisher[slot].to(dtype) * self.level.decay).clamp(max=1)

    def is_gated(self, state: DeltaState, loss: float) -> bool:
        level, before = self.level, state.history
        if level.gate_quantile is None:
            return level.gate is not None and loss <= level.gate
        state.history = [*before, loss][-HISTORY:]
        if not before:
            return False
        past = torch.tensor(before, dtype=torch.float64, device="cpu")
        return loss <= float(torch.quantile(past, level.gate_quantile))

    def take_over(self, state: DeltaState, fast: DeltaWriter, fast_state: DeltaState) -> float:
        """Δ_slow += r·Δ_fast, Δ_fast −= r·Δ_fast, on the weights that both levels have.

        Returns:
            the relative error of bringing Δ_slow back to its rank; see `Write`.
        """
        share = self.level.consolidate
        own = {target.name for target in self.targets}
        state.own()
        fast_state.own()
        errors = []
        for target in fast.targets:
            if target.name not in own:
                continue
            if self.level.rank is not None:
                errors += self._mix_in(state, fast, fast_state, target, 1.0, share)
            elif (delta := fast.full_delta(fast_state, target)) is not None:
                _step(state.deltas, target.name, delta, share)
            fast_slot = target.name if fast.level.rank is None else target.name + UP
            if fast_slot in fast_state.deltas:
                fast_state.deltas[fast_slot].mul_(1 - share)
        return relative(errors)

    def _mix_in(
        self, state: DeltaState, other: DeltaWriter, theirs: DeltaState, target: Target, *shares: float
    ) -> list[Tensor]:
        """`averages.mix_in` of another level's product, if that one has written."""
        if target.name + UP not in theirs.deltas:
            return []
        slots, rank = (target.name + DOWN, target.name + UP), self.level.rank or 0
        return [mix_in(state.deltas, slots, rank, LowRank(*other.factors(theirs, target)), *shares)]

    def average(
        self, state: DeltaState, averaged: DeltaWriter, averaged_state: DeltaState, rate: float | None = None
    ) -> float:
        """A ← A + rate · (Δ − A), by default with the level's own rate.

        Returns:
            the relative error of bringing A back to its rank; see `Write`.
        """
        rate = self.level.rate if rate is None else rate
        assert rate is not None
        state.own()
        if self.sparse is not None:
            self.sparse.approach(state, averaged_state, rate)
            return 0.0
        if self.full_targets or self.fixed_down:
            state.drawn = dict(averaged_state.drawn)
            for slot in self.keys:
                approach(state.deltas, slot, averaged_state.deltas.get(slot), rate)
            return 0.0
        errors = []
        for target in self.low_rank_targets:
            if target.name + UP not in averaged_state.deltas:
                approach(state.deltas, target.name + UP, None, rate)
            errors += self._mix_in(state, averaged, averaged_state, target, 1 - rate, rate)
        return relative(errors)

    def delta(self, state: DeltaState, target: Target) -> Tensor | SparseDelta | None:
        """Δ of one weight that is no product, as it is kept; None if it was never written."""
        return state.deltas.get(target.name) if self.sparse is None else self.sparse.delta(state, target.name)

    def full_delta(self, state: DeltaState, target: Target) -> Tensor | None:
        """Δ of one weight in the weight's own layout; None if it was never written. Not a copy."""
        if self.sparse is not None:
            sparse = self.sparse.delta(state, target.name)
            return None if sparse is None else sparse.full(target.weight)
        if self.level.rank is None:
            return state.deltas.get(target.name)
        if target.name + UP not in state.deltas:
            return None
        down, up = self.factors(state, target)
        return product(down, up).mT if target.transposed else product(down, up)


def _total(sums: Weights, more: Weights) -> Weights:
    """Sums of both by slot, new where both have one; float32 at least, as the second are."""
    total = {slot: sums[slot] + g if slot in sums else g for slot, g in more.items()}
    return {**sums, **total}


def accumulate(sums: Weights, grads: Weights, weight: float = 1.0) -> None:
    """Add `weight` times gradients to sums in place, which are float32 at least."""
    for slot, g in grads.items():
        if slot not in sums:
            sums[slot] = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
            if weight != 1.0:
                sums[slot].mul_(weight)
        else:
            sums[slot].add_(g, alpha=weight)


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
    for slower in writers[index + 1 :]:
        if slower.faster is not None and slower.faster.index == index:
            slower.add(row.levels[slower.index], row.levels[index].sums, slower.relayed)


def _end_chunk(
    writer: DeltaWriter, row: Row, row_index: int, pull: Weights | None, again: Replayed | None
) -> Write:
    """Write the level's chunk, which ends at the row's position, and let it follow faster levels."""
    state, faster = row.levels[writer.index], writer.faster
    if again is not None:  # after the sums were relayed: the slower level replays by itself
        writer.replay(state, again.grads)
    outcome = writer.write(state, pull)
    write = Write(writer.index, row_index, row.position, *outcome, replayed=again.count if again else 0)
    if faster and write.outcome == "written" and writer.level.consolidate:
        write = replace(write, truncation=writer.take_over(state, faster, row.levels[faster.index]))
    if (averaged := writer.averaged) and write.outcome == "written":
        write = replace(write, truncation=writer.average(state, averaged, row.levels[averaged.index]))
    return write


def learn_from(
    writers: Sequence[DeltaWriter],
    row: Row,
    lesson: Lesson,
    row_index: int,
    pulls: Mapping[int, Weights] | None = None,
    replayed: Mapping[int, Replayed] | None = None,
) -> list[Write]:
    """Let every level take what belongs to its chunk from the segment just read, and write at its boundary.

    A level counts the pairs inside the segment, and the crossing one unless its own chunk begins with the
    segment. The sum of a slow chunk is thus made of gradients at the weights that were in force when its
    tokens were read; nothing is read twice.

    Args:
        writers: one per level, fast to slow.
        row: the row, which has moved past the segment.
        lesson: what the segment taught.
        row_index: index of the row, for the reports.
        pulls: further gradients of levels that have their boundary here, by slot; see `DeltaWriter.write`.
        replayed: examples that levels read again at this boundary, by the level's index.

    Returns:
        the boundaries passed, faster levels first.
    """
    end = row.position
    writes = []
    for writer, state in zip(writers, row.levels, strict=True):
        size, faster = writer.level.chunk_size, writer.faster
        is_last = end % size == 0
        for pairs in lesson.within(size):
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
            pull, again = (pulls or {}).get(writer.index), (replayed or {}).get(writer.index)
            writes.append(_end_chunk(writer, row, row_index, pull, again))
    if any(write.outcome == "written" for write in writes):
        row.mark_changed()
    return writes
