"""Texts in blocks of one length, which is that of a chunk that a method learns at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
