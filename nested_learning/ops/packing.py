"""Lay out the real tokens of each batch row contiguously, so that all rows share their chunk boundaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowLayout(NamedTuple):
    """Where each row's real tokens stand in a layout of `columns` columns, without a host sync.

    Row b's n_b real tokens fill the columns offset_b … offset_b + n_b − 1, in order; with the offset
    equal to the row's position inside its chunk, a chunk boundary is the same column in every row.
    """

    source: Tensor  # [B, columns] index of the token in column c of row b (0 where there is none)
    filled: Tensor  # [B, columns] whether column c of row b holds a real token
    target: Tensor  # [B, T] column of each token (0 for padding)
    mask: Tensor  # [B, T] True = real token
    offset: Tensor  # [B] column of the row's first token
    end: Tensor  # [B] first column after the row's tokens, offset + n_b

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, columns, ...]; empty columns are zero."""
        return _rows(x, self.source) * _like(self.filled, x)

    def unpack(self, y: Tensor) -> Tensor:
        """[B, columns, ...] -> [B, T, ...]; padding is zero."""
        return _rows(y, self.target) * _like(self.mask, y)


def row_layout(mask: Tensor, offset: Tensor, columns: int) -> RowLayout:
    """The layout for `mask` [B, T] (True = real token) and each row's first column `offset` [B].

    `columns` must be at least max(offset) + T; it is a Python number so that nothing waits for the device.
    """
    T = mask.shape[1]
    rank = mask.cumsum(1) - 1  # of each real token among its row's
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)  # real tokens first
    count = mask.sum(1)
    wanted = torch.arange(columns, device=mask.device) - offset.unsqueeze(1)  # [B, columns] rank in column
    filled = (wanted >= 0) & (wanted < count.unsqueeze(1))
    source = order.gather(1, wanted.clamp(0, T - 1))
    target = (rank + offset.unsqueeze(1)).where(mask, 0)
    return RowLayout(source.where(filled, 0), filled, target, mask, offset, offset + count)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, c]] for x [B, T, ...] and index [B, C]."""
    shape = index.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index.view(shape).expand(index.shape + x.shape[2:]))


def _like(flag: Tensor, x: Tensor) -> Tensor:
    return flag.view(flag.shape + (1,) * (x.dim() - 2)).to(x.dtype)
