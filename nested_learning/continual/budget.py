"""How much memory learning takes, stated before it is needed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from nested_learning.continual.context import Context
from nested_learning.continual.find import is_quantised, memory_dtype
from nested_learning.continual.reader import Reader
from nested_learning.continual.replaying.replayer import Replayer
from nested_learning.continual.units import SparseWrites
from nested_learning.continual.writing import DeltaWriter


@dataclass(frozen=True)
class Budget:
    """Bytes, for one row unless said otherwise.

    Attributes:
        parameters: number of the base model's parameters.
        learned_parameters: number of those that some level has a delta on.
        base: parameters of the base model; shared by all learners and rows.
        effective_weights: W_base + Σ Δ, one set per base model; shared by all learners and rows.
        deltas: deltas of all levels, once written; of a sparse level what one write makes.
        sums: gradients of the unfinished chunks of all levels but the fastest, and of closed windows that
            are yet to be written (`Level.distill`).
        rules: states of the inner rules, as far as they are of a slot's size.
        gradients: gradients of one segment, while it is read; shared.
        context: keys and values of a full window, states of recurrent layers.
        activations: tensors kept for the backward pass of one segment (of an example of replay, where that is
            longer), and its logits; an estimate, shared.
        rows: number of rows.
        total: sum of all parts, for all rows.
        largest: the total once sparse levels have written every unit; the same without such levels.
        store: tokens and masks of a full store, in the memory of the CPU; 0 without replay.
        anchors: the Fisher diagonal that scales decays; shared by all rows.
    """

    parameters: int
    learned_parameters: int
    base: int
    effective_weights: int
    deltas: int
    sums: int
    rules: int
    gradients: int
    context: int
    activations: int
    rows: int
    total: int
    largest: int
    store: int = 0
    anchors: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def budget(reader: Reader, rows: int, replayer: Replayer | None = None) -> Budget:
    """The budget of a learner with that many rows."""
    model, writers = reader.model, reader.writers
    parameters = list(model.parameters())
    full = {t.name: t for w in writers for t in w.full_targets}
    learned = {t.name: t for w in writers for t in w.targets}
    base = sum(p.numel() * p.element_size() for p in parameters)
    effective = sum(
        math.prod(t.shape)
        * (memory_dtype(t.weight).itemsize if is_quantised(t.weight) else t.weight.element_size())
        for t in full.values()
    )
    levels = [level_bytes(writer) for writer in writers]
    at_once = max(reader.plan.segment, 0 if replayer is None else replayer.settings.piece)
    context, activations = _pass_bytes(reader, at_once)
    factors = sum(_slot_bytes(w) for w in writers if w.level.rank is not None and w.averaged is None)
    per_row = {
        "deltas": sum(own.deltas for own in levels),
        "sums": sum(own.sums for own in levels),
        "rules": sum(own.rules for own in levels),
        "context": context,
        "store": 0 if replayer is None else replayer.settings.tokens * (replayer.dtype.itemsize + 1),
    }
    shared = {
        "base": base,
        "effective_weights": effective,
        "gradients": effective + factors,
        "activations": activations,
        "anchors": reader.anchors.fisher.nbytes if reader.anchors.fisher else 0,
    }
    total = sum(shared.values()) + rows * sum(per_row.values())
    grown = sum(sum(level_bytes(writer, grown=True)) - sum(level_bytes(writer)) for writer in writers)
    return Budget(
        parameters=sum(p.numel() for p in parameters),
        learned_parameters=sum(t.weight.numel() for t in learned.values()),
        rows=rows,
        total=total,
        largest=total + rows * grown,
        **shared,
        **per_row,
    )


class LevelBytes(NamedTuple):
    """Bytes that one level holds for one row; the attributes are those of `Budget`."""

    deltas: int
    sums: int
    rules: int


def level_bytes(writer: DeltaWriter, *, grown: bool = False) -> LevelBytes:
    """Bytes of a level in one row, once it has written; of a sparse one with `grown`, once it has written
    every unit."""
    learned = _slot_bytes(writer)
    if writer.sparse is not None:
        return _sparse_bytes(writer, writer.sparse, grown)
    drawn = 0
    if writer.fixed_down and writer.averaged is None:  # an average has those of the level that it averages
        drawn = sum(
            memory_dtype(target.weight).itemsize
            * math.prod(target.stack)
            * (writer.level.rank or 0)
            * target.features[0]
            for target in writer.targets
        )
    return LevelBytes(learned + drawn, _sum_bytes(writer), writer.rule.kept * learned)


def _sparse_bytes(writer: DeltaWriter, sparse: SparseWrites, grown: bool) -> LevelBytes:
    size = memory_dtype(writer.targets[0].weight).itemsize
    deltas = rules = 0
    for layer in sparse.layers:
        units = layer.count if grown else sparse.number(layer)
        rows = size * units * sum(layer.width.values())
        rules += writer.rule.kept * rows
        deltas += rows + torch.int64.itemsize * units + (size * layer.count if writer.learns else 0)
    return LevelBytes(deltas, _sum_bytes(writer), rules)


def _sum_bytes(writer: DeltaWriter) -> int:
    """Bytes of the unfinished chunk's gradients, and of closed windows that are yet to be written."""
    kept = (1 if writer.index and writer.learns else 0) + (1 if writer.level.distill else 0)
    return kept * _slot_bytes(writer)


def _slot_bytes(writer: DeltaWriter) -> int:
    """Bytes of all slots of a level: of its deltas, or of the factors of them that change."""
    size, level = 0, writer.level
    for target in writer.targets:
        inputs, outputs = target.features
        own = math.prod(target.features)
        if level.rank is not None:
            own = level.rank * (outputs if writer.fixed_down else inputs + outputs)
        size += memory_dtype(target.weight).itemsize * math.prod(target.stack) * own
    return size


def _pass_bytes(reader: Reader, tokens: int) -> tuple[int, int]:
    """Bytes of the context of a full window, and those that autograd keeps for so many tokens: counted by
    running the model once on a few."""
    short = min(8, reader.plan.window)
    device = reader.model.device
    ids = torch.zeros(short + 1, dtype=torch.long, device=device)
    kept: dict[tuple[int, torch.Size], int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata, t.shape] = t.numel() * t.element_size()
        return t

    parameters = {p.untyped_storage()._cdata for p in reader.model.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        _, context = reader.losses(ids, Context())
    activations = sum(size for (storage, _), size in kept.items() if storage not in parameters)
    return context.nbytes_at(reader.plan.window), activations * tokens // short
