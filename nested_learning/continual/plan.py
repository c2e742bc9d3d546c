"""Where reading pauses, and how far attention reaches back: all of it decided by token positions alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nested_learning.continual.inputs import most_positions
from nested_learning.continual.level import Level
from nested_learning.optimizers.checks import Bound

DEFAULT_WINDOW = 1024
WHOLE = Bound(integer=True)


@dataclass(frozen=True)
class ReadingPlan:
    """How far reading goes in one pass, and how much it sees of what came before.

    A segment is read in one forward and backward pass, with the weights in force at its start. It ends at
    every boundary of any level, and after `segment` tokens within a chunk.

    Args:
        chunk_sizes: chunk sizes of the levels, fast to slow.
        segment: most tokens of a segment.
        window: positions of the attention context, the segment itself included.
        overlap: tokens that a new window begins with.
        gradient_checkpointing: run the layers twice to keep less.
        distill_top_k: how many predictions of each token are kept for distillation; 0 where no level distils.
    """

    chunk_sizes: tuple[int, ...]
    segment: int
    window: int
    overlap: int
    gradient_checkpointing: bool
    distill_top_k: int = 0

    @classmethod
    def fitted(
        cls,
        model: Any,
        levels: Sequence[Level],
        segment: int | None,
        window: int | None,
        overlap: int | None,
        gradient_checkpointing: bool,
    ) -> ReadingPlan:
        """The plan of `stack_levels`, whose defaults stand for None.

        Raises:
            ValueError: a segment of one token, a window that does not fit, or no whole numbers.
        """
        sizes = {"segment": segment, "window": window, "overlap": overlap}
        for name, size in sizes.items():
            if size is not None:
                WHOLE.check(name, size)
        if not isinstance(gradient_checkpointing, bool):
            raise ValueError(f"gradient_checkpointing must be True or False, got {gradient_checkpointing!r}")
        limit = most_positions(model)
        fast = levels[0].chunk_size
        if segment is None:
            segment = max(2, min(fast, limit // 2))
        if window is None:
            window = min(limit, max(DEFAULT_WINDOW, 2 * segment))
        if overlap is None:
            overlap = max(1, min(window // 8, window - segment))
        if segment < 2:
            raise ValueError(f"segment must be at least 2 tokens, got {segment}")
        segment = min(segment, fast)
        if not 1 <= overlap <= window - segment or window > limit:
            raise ValueError(
                f"window {window} must hold a segment of {segment} tokens and {overlap} (overlap, at "
                f"least 1) before it, and be at most the model's {limit} positions; choose a shorter "
                "segment or overlap"
            )
        chunks = tuple(level.chunk_size for level in levels)
        return cls(chunks, segment, window, overlap, gradient_checkpointing)

    def describe(self) -> dict[str, int]:
        """The settings that decide how a text is read, as JSON values."""
        settings = {"segment": self.segment, "window": self.window, "overlap": self.overlap}
        return {**settings, "distill_top_k": self.distill_top_k} if self.distill_top_k else settings

    @property
    def half(self) -> int:
        """The index in a window from which on its second half goes."""
        return self.window // 2

    def window_ends(self, length: int, position: int) -> bool:
        """Whether the segment that begins at `position` needs a new window, the present one having `length`
        tokens."""
        return length + self.segment_end(position) - position > self.window

    def segment_end(self, position: int) -> int:
        """The end of the segment that begins at, or contains, token `position`."""
        fast_start = position // self.chunk_sizes[0] * self.chunk_sizes[0]
        pauses = [(position // size + 1) * size for size in self.chunk_sizes]
        pauses.append(fast_start + ((position - fast_start) // self.segment + 1) * self.segment)
        return min(pauses)

    def pieces(self, position: int, count: int) -> Iterator[tuple[slice, bool]]:
        """The next `count` tokens, cut at ends of segments: (their slice, whether a segment ends there)."""
        start = 0
        while start < count:
            end = self.segment_end(position + start) - position
            yield slice(start, min(end, count)), end <= count
            start = end
