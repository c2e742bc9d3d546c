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
    real: Tensor  # [B, columns] bool, whether column c of row b holds a token
    target: Tensor  # [B, T] column of each token (0 for padding)
    given: Tensor  # [B, T] bool, the real tokens as they came
    offset: Tensor  # [B] column of the row's first token
    end: Tensor  # [B] first column after the row's tokens, offset + n_b

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, columns, ...]; empty columns are zero."""
        return _chosen(self.real, _rows(x, self.source))

    def unpack(self, y: Tensor) -> Tensor:
        """[B, columns, ...] -> [B, T, ...]; padding is zero."""
        return _chosen(self.given, _rows(y, self.target))


def row_layout(real: Tensor, offset: Tensor, columns: int) -> RowLayout:
    """The layout for tokens `real` [B, T] (bool, False = padding) and each row's first column `offset` [B].

    `columns` must be at least max(offset) + T; it is a Python number so that nothing waits for the device.
    """
    T = real.shape[1]
    rank = real.cumsum(1) - 1  # place of each real token among its row's
    order = torch.argsort(real.logical_not().to(torch.uint8), dim=1, stable=True)  # real tokens first
    count = real.sum(1)
    wanted = torch.arange(columns, device=real.device) - offset.unsqueeze(1)  # [B, columns] rank in column
    held = (wanted >= 0) & (wanted < count.unsqueeze(1))
    source = order.gather(1, wanted.clamp(0, T - 1))
    target = (rank + offset.unsqueeze(1)).where(real, 0)
    return RowLayout(source.where(held, 0), held, target, real, offset, offset + count)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, c]] for x [B, T, ...] and index [B, C]."""
    shape = index.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index.view(shape).expand(index.shape + x.shape[2:]))


def _chosen(flag: Tensor, x: Tensor) -> Tensor:
    """x [B, C, ...] where `flag` [B, C] is set, else zero: no product, as padding may hold NaN."""
    return torch.where(flag.view(flag.shape + (1,) * (x.dim() - 2)), x, 0)
