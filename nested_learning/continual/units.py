"""Hidden units of MLPs: where the weights of a unit lie, and writes to a few units alone.

A unit is one row of each matrix that leads into the hidden layer (two of a fused gate and up) and one column
of the matrix that leads out of it. A sparse level keeps a delta as rows [units, weights of a unit], for the
units that were ever written, and so the state of its rule; their indices stand once per MLP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.continual.deltas import DeltaState
from nested_learning.continual.find import Target, memory_dtype
from nested_learning.continual.rules import Rule, RuleState
from nested_learning.memory.state import Weights

CHUNKS = 64  # chunks that the running background remembers, about


@dataclass(frozen=True)
class UnitPlace:
    """Place of a hidden layer's units in one weight.

    Args:
        axis: dimension of the stored weight along which the units lie.
        repeats: how many slices a unit has there: 2 in a fused gate and up, whose halves follow each other.
        count: number of units.
    """

    axis: int
    repeats: int
    count: int

    def slices(self, units: Tensor) -> Tensor:
        """Indices [repeats · m] along `axis` of units [m]."""
        return torch.cat([units + i * self.count for i in range(self.repeats)])

    def rows(self, matrix: Tensor, units: Tensor) -> Tensor:
        """The weights of units [m], [m, weights of a unit], of a matrix in the layout of the weight."""
        found = matrix.index_select(self.axis, self.slices(units))
        found = found.T if self.axis else found
        return found.unflatten(0, (self.repeats, -1)).transpose(0, 1).flatten(1)

    def laid_out(self, rows: Tensor) -> Tensor:
        """Rows [m, weights of a unit] as slices in the layout of the weight."""
        found = rows.unflatten(1, (self.repeats, -1)).transpose(0, 1).flatten(0, 1)
        return found.T if self.axis else found

    def squares(self, matrix: Tensor) -> Tensor:
        """Σ of the squares of each unit's weights, [count], at least in float32, finite where they are."""
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        norms = torch.linalg.vector_norm(matrix, dim=1 - self.axis, dtype=dtype)
        return norms.square().unflatten(0, (self.repeats, -1)).sum(0).clamp_max(torch.finfo(dtype).max)


@dataclass(frozen=True)
class HiddenLayer:
    """The units of one MLP.

    Args:
        name: name of the module around the MLP's linear maps.
        count: number of units.
        places: where they lie, by the names of the weights.
        width: weights of a unit in each of them.
    """

    name: str
    count: int
    places: dict[str, UnitPlace]
    width: dict[str, int]


class SparseDelta(NamedTuple):
    """A delta on some units of a weight.

    Attributes:
        place: where they lie.
        units: indices [m], ascending.
        rows: [m, weights of a unit].
    """

    place: UnitPlace
    units: Tensor
    rows: Tensor

    def full(self, weight: Tensor) -> Tensor:
        """The delta as a matrix in the layout of the weight."""
        zeros = torch.zeros(weight.shape, dtype=self.rows.dtype, device=weight.device)
        where = self.place.slices(self.units)
        return zeros.index_copy_(self.place.axis, where, self.place.laid_out(self.rows))

    @classmethod
    def sum(cls, deltas: Sequence[SparseDelta]) -> SparseDelta:
        """The sum of several deltas on one weight."""
        if len(deltas) == 1:
            return deltas[0]
        units = torch.unique(torch.cat([each.units for each in deltas]))
        rows = deltas[0].rows.new_zeros(len(units), deltas[0].rows.shape[1])
        for each in deltas:
            rows.index_add_(0, torch.searchsorted(units, each.units), each.rows)
        return cls(deltas[0].place, units, rows)


class Chosen(NamedTuple):
    """Units that one write changes.

    Attributes:
        grads: their gradients [k, weights of a unit], by slot.
        rule: their states of the rule.
        positions: where they stand among the level's units, [k], by the names of the MLPs.
    """

    grads: Weights
    rule: RuleState
    positions: dict[str, Tensor]


def find_hidden_layers(targets: Iterable[Target]) -> list[HiddenLayer]:
    """The MLPs that the targets are.

    Raises:
        ValueError: the weights beside each other in a module are no MLP, or are no matrices.
    """
    groups: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        groups[target.name.rsplit(".", 2)[0]].append(target)
    return [_hidden_layer(name, group) for name, group in groups.items()]


def _hidden_layer(name: str, group: Sequence[Target]) -> HiddenLayer:
    names = ", ".join(target.name for target in group)
    for target in group:
        if target.weight.ndim != 2:
            raise ValueError(
                f"{target.name} has {target.weight.ndim} dimensions; a sparse level chooses the hidden units "
                "of MLPs whose weights are matrices: leave `sparse` out"
            )
    # the last one where several fit, in a square MLP: maps out of the hidden layer are registered last
    for last in reversed(group):
        count, width = last.features
        into = [target for target in group if target is not last]
        if into and all(t.features in ((width, count), (width, 2 * count)) for t in into):
            break
    else:
        raise ValueError(
            f"{names}: not the matrices of one MLP, which lead into a hidden layer and out of it; a sparse "
            "level chooses hidden units of whole MLPs: leave `sparse` out, or leave `modules` out"
        )
    places = {t.name: UnitPlace(int(t.transposed), t.features[1] // count, count) for t in into}
    places[last.name] = UnitPlace(1 - int(last.transposed), 1, count)
    return HiddenLayer(name, count, places, {t.name: t.weight.numel() // count for t in group})


class SparseWrites:
    """Writes to those units of each MLP whose gradient stands out against what it usually is.

    The score of a unit is ‖g‖² / (b + b̄): g its gradient in this chunk, b the mean of ‖g‖² over the chunks
    before (about the last 64), b̄ the mean of b over the MLP, so that a unit that hardly ever has a gradient
    is not chosen for having a little. In the first chunk it is ‖g‖².

    Args:
        fraction: share of the units that one write changes, rounded up.
        targets: weights of whole MLPs.
        rule: the inner rule, which begins anew for each unit that is written for the first time.

    Attributes:
        layers: the MLPs.
        layer_of: the MLP of each weight, by name.
    """

    def __init__(self, fraction: float, targets: Sequence[Target], rule: Rule) -> None:
        self.fraction = fraction
        self.rule = rule
        self.layers = find_hidden_layers(targets)
        self.layer_of = {slot: layer for layer in self.layers for slot in layer.places}
        self._dtypes = {target.name: memory_dtype(target.weight) for target in targets}

    def number(self, layer: HiddenLayer) -> int:
        """How many units of an MLP one write changes."""
        return math.ceil(self.fraction * layer.count - 1e-9)

    def delta(self, state: DeltaState, slot: str) -> SparseDelta | None:
        """The delta of one weight; None if it was never written."""
        if slot not in state.deltas:
            return None
        layer = self.layer_of[slot]
        return SparseDelta(layer.places[slot], state.units[layer.name], state.deltas[slot])

    def choose(self, state: DeltaState, sums: Weights) -> Chosen:
        """The units that a write with these gradients changes; the background takes the gradients in."""
        grads: Weights = {}
        positions: dict[str, Tensor] = {}
        for layer in self.layers:
            own = {slot: sums[slot] for slot in layer.places if slot in sums}
            if not own:
                continue
            squares = torch.stack([layer.places[slot].squares(g) for slot, g in own.items()]).sum(0)
            units = self._standing_out(state, layer, squares)
            positions[layer.name] = self.grow(state, layer, units)
            grads.update({slot: layer.places[slot].rows(g, units) for slot, g in own.items()})
        state.chunks += 1
        rule = {
            slot: {field: t[positions[self.layer_of[slot].name]] for field, t in state.rule[slot].items()}
            for slot in grads
            if slot in state.rule
        }
        return Chosen(grads, rule, positions)

    def _standing_out(self, state: DeltaState, layer: HiddenLayer, squares: Tensor) -> Tensor:
        """Units of the highest scores, ascending."""
        usual, score = state.background.get(layer.name), squares
        if usual is not None:
            mean = usual.mean()
            score = squares / torch.where(mean > 0, usual + mean, 1.0)
        seen = min(state.chunks, CHUNKS - 1)
        state.background[layer.name] = squares if usual is None else usual + (squares - usual) / (seen + 1)
        return score.topk(self.number(layer)).indices.sort().values

    def grow(self, state: DeltaState, layer: HiddenLayer, units: Tensor) -> Tensor:
        """Make room for units; new ones have a delta of zero and the rule's empty state.

        Returns:
            where each of them stands, [k].
        """
        known = state.units.get(layer.name, units[:0])
        joined = torch.unique(torch.cat([known, units]))
        stay = torch.searchsorted(joined, known)
        state.units[layer.name] = joined
        for slot, width in layer.width.items():
            old = state.deltas.get(slot)
            if old is None or len(joined) > len(known):
                dtype = self._dtypes[slot] if old is None else old.dtype
                new = torch.zeros(len(joined), width, dtype=dtype, device=units.device)
                empty = self.rule.empty(new)
                state.deltas[slot] = new if old is None else new.index_copy(0, stay, old)
                stored = {
                    field: t.expand(len(joined), t.shape[-1] if t.ndim else 1) for field, t in empty.items()
                }
                if slot in state.rule:
                    stored = {
                        field: t.index_copy(0, stay, state.rule[slot][field]) for field, t in stored.items()
                    }
                if stored:
                    state.rule[slot] = stored
        return torch.searchsorted(joined, units)

    def put(
        self,
        state: DeltaState,
        chosen: Chosen,
        directions: Weights,
        steps: Mapping[str, float],
        rule: RuleState,
    ) -> None:
        """Δ ← Δ + step · direction on the chosen units of each slot, and the rule's new states there."""
        for slot, direction in directions.items():
            at = chosen.positions[self.layer_of[slot].name]
            delta = state.deltas[slot]
            delta.index_add_(0, at, direction.to(delta.dtype), alpha=steps[slot])
        for slot, stored in rule.items():
            at, kept = chosen.positions[self.layer_of[slot].name], state.rule[slot]
            state.rule[slot] = {field: kept[field].index_copy(0, at, new) for field, new in stored.items()}

    def approach(self, state: DeltaState, averaged: DeltaState, rate: float) -> None:
        """A ← A + rate · (Δ − A) on the units of both."""
        for layer in self.layers:
            slots = [slot for slot in layer.places if slot in state.deltas]
            for slot in slots:
                state.deltas[slot].mul_(1 - rate)
            if layer.name in averaged.units:
                at = self.grow(state, layer, averaged.units[layer.name])
                for slot in layer.places:
                    state.deltas[slot].index_add_(0, at, averaged.deltas[slot], alpha=rate)
