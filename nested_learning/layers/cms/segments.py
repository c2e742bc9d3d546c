"""Cut the tokens of a call at the chunk boundaries of every row, wherever the rows stand in their chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.layers.token_inputs import without_padding
from nested_learning.ops.packing import RowLayout, row_layout


class Segment(NamedTuple):
    """Columns `start` to `stop` of the packed tokens; a boundary lies at their end or nowhere.

    real: [B, stop − start] bool, None where all columns are.
    read_only: nothing is to be learned from these columns.
    """

    start: int
    stop: int
    real: Tensor | None
    read_only: bool

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, x: Tensor) -> Tensor:
        """x [B, columns, ...] -> [B, stop − start, ...]."""
        return x[:, self.start : self.stop]


class Segments:
    """Tokens laid out so that no row has a chunk boundary inside a segment.

    The first segment has S = min(C, T) columns, the next ones C. A row that comes to its next boundary
    within S tokens has them right before the end of the first segment; a row that does not come so far in
    the whole call (then T < C) begins at column 0. Single tokens thus cost one column, short pieces at most
    twice their length, and nothing waits for the device.

    Args:
        shape: (B, T) of the call.
        chunk_size: C.
        position: [B] int64, tokens before the call; a number where they are as many for all rows.
        real: [B, T] bool, True = real token; None: all are.
        inside: no row comes to a boundary with these tokens, hence they are one segment as they stand.
        longest: tokens of the longest row to its end, where no state is wanted and `position` is a number.

    Attributes:
        position: tokens before the call where all rows have as many and none has padding; else None.
        inside: as given.
        taught: columns to learn from; what is learned from the others, no token that is read would see.
    """

    def __init__(
        self,
        shape: Sequence[int],
        chunk_size: int,
        position: Tensor | int,
        real: Tensor | None,
        inside: bool = False,
        longest: int | None = None,
    ) -> None:
        batch_size, length = shape
        self.inside, self.position = inside, None
        self._layout: RowLayout | None = None
        first, columns, self._real = min(chunk_size, length), length, real
        if isinstance(position, int) and real is None:
            self.position = position
            first = min(chunk_size - position % chunk_size, length)
        elif inside:
            first = length
        elif length > 1:
            device = position.device if isinstance(position, Tensor) else None
            if real is None:
                real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
            if isinstance(position, int):
                position = torch.full((batch_size,), position, device=real.device)
            left = chunk_size - position.to(real.device) % chunk_size
            columns = first + length - 1
            self._layout = row_layout(real, (first - left).clamp_min(0), columns)
            self._real = self._layout.real
        ends = [*range(first, columns, chunk_size), columns]
        self._bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        self.taught = columns
        if longest is not None and self.position is not None:
            # From the begin of the last chunk on: its write would come too late.
            last = (longest - 1) // chunk_size * chunk_size
            self.taught = min(max(last - self.position, 0), columns)

    def __iter__(self) -> Iterator[Segment]:
        for start, stop in self._bounds:
            real = None if self._real is None else self._real[:, start:stop]
            yield Segment(start, stop, real, start >= self.taught)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, columns, ...]; empty columns are zero."""
        if self._layout is None:
            return without_padding(x, self._real)
        if x.is_floating_point():
            return self._layout.pack(x)
        return self._layout.pack(x.long()).to(x.dtype)

    def unpack(self, y: Tensor) -> Tensor:
        """[B, columns, ...] -> [B, T, ...]; padding is zero."""
        return y if self._layout is None else self._layout.unpack(y)

    def learned(self, learn: Tensor | None) -> Tensor | None:
        """The columns [B, columns] to learn from, of the tokens `learn` [B, T] (None: all); None: all."""
        if learn is None:
            return self._real
        learn = self.pack(learn)
        return learn if self._real is None else learn & self._real
