"""Traces of a reading as plain arrays: what each memory did, what levels wrote, what a learner learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nested_learning.layers.memory.watch import Array, MemoryTrace

if TYPE_CHECKING:
    from nested_learning.continual.writing import Write
    from nested_learning.levels import NestedSystem


@dataclass(frozen=True, eq=False)
class LevelTrace:
    """Trace of one CMS level in one layer.

    Attributes:
        layer: index of the block.
        level: index of the level, 0 is the fastest.
        chunk_size: tokens between its boundaries.
        learns: whether it learns from what it reads; else its boundaries are an optimizer's.
        positions: [W] tokens read at its boundaries.
        sizes: [W] Frobenius norm of each write, the change of the block's matrices; empty where it does not
            learn. NaN for a write that has not come yet: `lm` writes with the first token after a boundary.
    """

    layer: int
    level: int
    chunk_size: int
    learns: bool
    positions: NDArray[np.int64]
    sizes: Array


@dataclass(frozen=True)
class Prediction:
    """Prediction of one token, by the base model and with what was learned.

    Attributes:
        position: index of the token that is predicted.
        divergence: KL(after ‖ before) of the two distributions, in nats.
        before, after: (token, probability), the likeliest first.
    """

    position: int
    divergence: float
    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class LearnedTrace:
    """Trace of a learner: its base model, the reading, and the base model with what was learned.

    Attributes:
        start: tokens that its memory had read before this text.
        before, after: [T] next-token losses in nats of the base model and of the model with all deltas, both
            with the same context; NaN for the first token.
        divergence: [T] KL(after ‖ before) of the prediction of each token, in nats.
        levels: a line on each level, fast to slow.
        writes: reports of the boundaries passed; their positions count from the memory's first token.
        norms: Frobenius norm of each weight's change, by its name in the base model.
        relative: the same divided by the norm of the weight, NaN where that has none.
        layers: index of the layer of each weight.
        units: by weight, the norm of the change of each hidden unit's row or column.
        predictions: those that moved most, the furthest first.
    """

    start: int
    before: Array
    after: Array
    divergence: Array
    levels: tuple[str, ...]
    writes: tuple[Write, ...]
    norms: dict[str, float]
    relative: dict[str, float]
    layers: dict[str, int]
    units: dict[str, Array]
    predictions: tuple[Prediction, ...]

    @property
    def layer_norms(self) -> dict[int, float]:
        """Norm of the change of each layer's weights together, by its index, rising."""
        found: dict[int, float] = {}
        for name, layer in sorted(self.layers.items(), key=lambda item: item[1]):
            found[layer] = math.hypot(found.get(layer, 0.0), self.norms[name])
        return found


@dataclass(frozen=True, eq=False)
class Traces:
    """Everything that was seen while a model read a text of T tokens.

    Attributes:
        model: a line on the model.
        tokens: text of each token; those of a whole character's bytes but the last are empty.
        ids: [T] their ids.
        loss: [T] next-token losses in nats, while reading; NaN for the first token.
        moments: [M] tokens read when memories were looked at.
        memories: traces of the memory layers, in the order of the model.
        levels: traces of the CMS levels.
        system: the model as a nested system.
        learned: trace of a learner, None for other models.
    """

    model: str
    tokens: tuple[str, ...]
    ids: NDArray[np.int64]
    loss: Array
    moments: NDArray[np.int64]
    memories: tuple[MemoryTrace, ...]
    levels: tuple[LevelTrace, ...]
    system: NestedSystem
    learned: LearnedTrace | None = None
