"""The lesson of a segment: the pairs of neighbouring tokens that were read, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nested_learning.memory.state import Weights


@dataclass(frozen=True)
class Pairs:
    """Pairs of neighbouring tokens. Those whose second token is not learned count in no attribute.

    Attributes:
        count: number of pairs that are learned.
        loss: sum of their next-token losses in nats.
        grads: gradient of that sum, by key (see `DeltaWriter.keys`); empty where nothing learns.
    """

    count: int
    loss: float
    grads: Weights


@dataclass(frozen=True)
class Lesson:
    """Gradients and losses that a segment taught.

    Attributes:
        start: position of the segment's first token in the text.
        crossing: the pair of the last token before the segment and its first one; none at a text's start.
            Its gradient is kept apart, since it belongs to those levels alone whose chunk does not begin
            with the segment.
        inside: the pairs inside the segment.
        is_finite: whether the losses of all pairs are finite, learned or not.
        losses: next-token losses (nats) of the segment's tokens, on the model's device; one fewer where
            nothing comes before the segment.
    """

    start: int
    crossing: Pairs
    inside: Pairs
    is_finite: bool
    losses: Tensor

    def within(self, chunk_size: int) -> tuple[Pairs, ...]:
        """The pairs that a level of this chunk size counts: not the crossing one where its chunk begins."""
        return (self.crossing, self.inside) if self.start % chunk_size else (self.inside,)


@dataclass(frozen=True)
class Replayed:
    """Kept examples that one level read again at its boundary.

    Attributes:
        count: number of their tokens that were learned.
        grads: gradient of the sum of these tokens' losses, by key.
        sources: names of the sources that they are from.
    """

    count: int
    grads: Weights
    sources: frozenset[str | None]
