"""Texts that are read once: passages with what is to be learned of them, and blocks of one length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Passage:
    """Ids that belong together: a running text, a sentence pair, an example with its label.

    Attributes:
        ids: all ids.
        learned: slice of them that is to be learned, from and to; None for all.
        label: in words, where there is one.
    """

    ids: tuple[int, ...]
    learned: tuple[int, int] | None = None
    label: str | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before those that are learned."""
        return self.ids[: self.learned[0]] if self.learned else ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The ids that are learned."""
        return self.ids[slice(*self.learned)] if self.learned else self.ids

    @property
    def mask(self) -> list[int]:
        """1 where an id is learned, else 0."""
        if self.learned is None:
            return [1] * len(self.ids)
        start, end = self.learned
        return [0] * start + [1] * (end - start) + [0] * (len(self.ids) - end)


@dataclass(frozen=True)
class Reading:
    """Passages that are read one after the other.

    Attributes:
        passages: in the order of reading.
        filler: ids that fill up a block; passages are not cut then, unless one is longer than a block. Empty:
            a running text, cut anywhere, its last block as short as it is.
    """

    passages: tuple[Passage, ...]
    filler: tuple[int, ...] = ()

    def blocks(self, size: int) -> list[tuple[Tensor, Tensor | None]]:
        """Blocks of `size` ids [T] with the mask of what is learned [T]; no mask where that is all."""
        if all(passage.learned is None for passage in self.passages):
            whole = torch.tensor([i for passage in self.passages for i in passage.ids])
            return [(block, None) for block in whole.split(size)]
        pieces = self.spaced(size)
        ids = torch.tensor([i for piece in pieces for i in piece.ids])
        masks = torch.tensor([i for piece in pieces for i in piece.mask]).bool()
        return list(zip(ids.split(size), masks.split(size), strict=True))

    def spaced(self, size: int) -> list[Passage]:
        """The passages, with filler between them and at the end that fills blocks of `size` ids up.

        Only a passage that is longer than a block goes over several. Nothing of the filler is learned, and it
        has no label.
        """
        pieces, taken = [], 0  # ids of the block that is not full yet
        for passage in self.passages:
            length = len(passage.ids)
            if taken and taken + length > size:
                pieces.append(self._filler(size - taken))
                taken = 0
            pieces.append(passage)
            taken = (taken + length) % size
        return [*pieces, self._filler(size - taken)] if taken else pieces

    def _filler(self, length: int) -> Passage:
        filler = self.filler or (0,)
        return Passage(tuple(filler[place % len(filler)] for place in range(length)), (0, 0))

    def labels(self) -> list[str]:
        """The labels, each once, in the order of reading."""
        return list(dict.fromkeys(each.label for each in self.passages if each.label is not None))

    def first_of_each(self, count: int) -> list[Passage]:
        """The first `count` passages of each label, in the order of reading."""
        seen: dict[str | None, int] = {}
        chosen = []
        for passage in self.passages:
            if seen.get(passage.label, 0) < count:
                seen[passage.label] = seen.get(passage.label, 0) + 1
                chosen.append(passage)
        return chosen


def merged_reading(readings: Sequence[Reading], seed: int) -> Reading:
    """All passages shuffled: what joint training learns."""
    passages = [passage for reading in readings for passage in reading.passages]
    random.Random(seed).shuffle(passages)
    return Reading(tuple(passages), readings[0].filler)
