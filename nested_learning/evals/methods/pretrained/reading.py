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
        ids = [passage.ids for passage in self.passages]
        if all(passage.learned is None for passage in self.passages):
            whole = torch.tensor([i for each in ids for i in each])
            return [(block, None) for block in whole.split(size)]
        filler = self.filler or (0,)
        masks = packed([passage.mask for passage in self.passages], size, [0] * len(filler))
        return [(block, mask.bool()) for block, mask in zip(packed(ids, size, filler), masks, strict=True)]

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


def packed(pieces: Sequence[Sequence[int]], size: int, filler: Sequence[int]) -> list[Tensor]:
    """Pieces in their order in blocks [size]; only one that is longer than a block goes over several."""
    blocks: list[list[int]] = [[]]
    for piece in pieces:
        if blocks[-1] and len(blocks[-1]) + len(piece) > size:
            blocks.append([])
        blocks[-1] += piece
        while len(blocks[-1]) > size:
            blocks.append(blocks[-1][size:])
            del blocks[-2][size:]
    filled = (block + list(filler) * (size - len(block)) for block in blocks)
    return [torch.tensor(block[:size]) for block in filled]
