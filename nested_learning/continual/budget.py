"""How much memory learning takes, stated before it is needed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from nested_learning.continual.context import Context
from nested_learning.continual.find import is_quantised, memory_dtype
from nested_learning.continual.reader import Reader
from nested_learning.continual.writing import DeltaWriter


@dataclass(frozen=True)
class Budget:
    """Bytes, for one row unless said otherwise.

    Attributes:
        parameters: number of the base model's parameters.
        learned_parameters: number of those that some level has a delta on.
        base: parameters of the base model; shared by all learners and rows.
        effective_weights: W_base + Σ Δ, one set per base model; shared by all learners and rows.
        deltas: deltas of all levels, once written.
        sums: gradients of the unfinished chunks of all levels but the fastest.
        rules: states of the inner rules (a memory form of one's own counts as one tensor per slot).
        gradients: gradients of one segment, while it is read; shared.
        context: keys and values of a full window, states of recurrent layers.
        activations: tensors kept for the backward pass of one segment, and its logits; an estimate, shared.
        rows: number of rows.
        total: sum of all parts, for all rows.
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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def budget(reader: Reader, rows: int) -> Budget:
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
    factors = sum(own.deltas for w, own in zip(writers, levels, strict=True) if w.level.rank is not None)
    context, activations = _pass_bytes(reader)
    per_row = {
        "deltas": sum(own.deltas for own in levels),
        "sums": sum(own.sums for own in levels),
        "rules": sum(own.rules for own in levels),
        "context": context,
    }
    shared = {
        "base": base,
        "effective_weights": effective,
        "gradients": effective + factors,
        "activations": activations,
    }
    return Budget(
        parameters=sum(p.numel() for p in parameters),
        learned_parameters=sum(t.weight.numel() for t in learned.values()),
        rows=rows,
        total=sum(shared.values()) + rows * sum(per_row.values()),
        **shared,
        **per_row,
    )


class LevelBytes(NamedTuple):
    """Bytes that one level holds for one row; the attributes are those of `Budget`."""

    deltas: int
    sums: int
    rules: int


def level_bytes(writer: DeltaWriter) -> LevelBytes:
    """Bytes of a level in one row, once it has written."""
    deltas, level = 0, writer.level
    for target in writer.targets:
        size = memory_dtype(target.weight).itemsize
        per_matrix = math.prod(target.features) if level.rank is None else level.rank * sum(target.features)
        deltas += size * math.prod(target.stack) * per_matrix
    return LevelBytes(deltas, deltas if writer.index and writer.learns else 0, writer.rule.kept * deltas)


def _pass_bytes(reader: Reader) -> tuple[int, int]:
    """Bytes of the context of a full window, and those that autograd keeps for a segment: counted by running
    the model once on a short one."""
    tokens, short = reader.plan.segment, min(8, reader.plan.window)
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
