"""The lesson of a segment: the pairs of neighbouring tokens that were read, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    start: int
    crossing: Pairs
    inside: Pairs
    is_finite: bool
