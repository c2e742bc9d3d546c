"""Gradients of the losses of a text by rates and starts, and what levels begin with at one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nested_learning.continual.deltas import DOWN, DeltaState
from nested_learning.continual.writing import DeltaWriter, Write
from nested_learning.memory.state import Weights


@dataclass(frozen=True)
class Beginning:
    """Rates and starts of all levels at one step of learning them.

    Attributes:
        starts: start of each level by slot, cut from any graph; of low-rank levels always both factors.
        log_rates: logarithm of the factor of `lr` for each slot of each level.
        learned: slots whose start is learned, of each level.
    """

    starts: tuple[Weights, ...]
    log_rates: tuple[dict[str, float], ...]
    learned: tuple[frozenset[str], ...]

    def states(self, writers: Sequence[DeltaWriter]) -> list[DeltaState]:
        """States of a row that has read nothing."""
        states = []
        for writer, start in zip(writers, self.starts, strict=True):
            drawn = {name for name in start if writer.fixed_down and name.endswith(DOWN)}
            deltas = {name: t for name, t in start.items() if name not in drawn}
            states.append(DeltaState(deltas, drawn={name: start[name] for name in drawn}, shared=True))
        return states


@dataclass
class MetaGradient:
    """Gradient of the mean loss of a text.

    Attributes:
        loss: mean next-token loss of all pairs of the text, in nats, each scored before it is learned from.
        starts: gradient by the start of each slot that is learned, of each level.
        log_rates: gradient by the logarithm of each slot's rate, 0-D float64, of each level.
    """

    loss: float
    starts: tuple[Weights, ...]
    log_rates: tuple[Weights, ...]

    @classmethod
    def zero(cls, begin: Beginning) -> MetaGradient:
        """A gradient of zeros, to be added to."""
        rates = tuple(
            {slot: torch.zeros((), dtype=torch.float64, device="cpu") for slot in own}
            for own in begin.log_rates
        )
        return cls(0.0, tuple({} for _ in begin.starts), rates)

    def add_start(self, level: int, slot: str, g: Tensor) -> None:
        """Add to the gradient by a start."""
        own = self.starts[level]
        own[slot] = own[slot] + g if slot in own else g

    @property
    def is_finite(self) -> bool:
        """Whether the loss and all gradients are finite."""
        parts = [t for own in (*self.starts, *self.log_rates) for t in own.values()]
        return all(bool(t.isfinite().all()) for t in [torch.tensor(self.loss, device="cpu"), *parts])


@dataclass
class StartShares:
    """How much of each start is left in the delta: what decay has let of it, a number or one per weight.

    A delta is then S · start + written, where `written` is what the level's own writes have made.
    """

    levels: list[dict[str, float | Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, writers: Sequence[DeltaWriter]) -> StartShares:
        """Whole starts."""
        return cls([dict.fromkeys(writer.keys, 1.0) for writer in writers])

    def decay(self, writer: DeltaWriter) -> None:
        """A write with decay was made."""
        own = self.levels[writer.index]
        for slot in own if writer.level.decay else ():
            if not slot.endswith(DOWN):  # a product shrinks with one of its factors
                own[slot] = own[slot] * writer.kept_share(slot, torch.float64)

    def follow(self, writers: Sequence[DeltaWriter], writes: Sequence[Write]) -> None:
        """Take the decay of these writes in; a re-reading forgets nothing."""
        for write in writes:
            if write.outcome == "written" and not write.reread:
                self.decay(writers[write.level])
