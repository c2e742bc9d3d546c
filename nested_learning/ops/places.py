"""Move rows of a tensor to other places, and their gradients back, without adding anything up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.context import traced


class Places(NamedTuple):
    """For each of K entries the row that it is taken from.

    Attributes:
        rows: [K] int64.
        empty: [E] int64, the entries that take none and are zero; None where there are none.
    """

    rows: Tensor
    empty: Tensor | None

    @classmethod
    def of(cls, index: Tensor, device: torch.device) -> Places:
        """From `index` [K] int64 on the CPU, negative where an entry takes no row."""
        empty = (index < 0).nonzero().squeeze(1)
        return cls(index.clamp_min(0).to(device), empty.to(device) if len(empty) else None)


def take(x: Tensor, places: Places, back: Places) -> Tensor:
    """Rows of x [M, ...] at `places`: [K, ...].

    The gradient is taken the same way, by `back`. That of indexing adds up: it fills M rows with zeros for
    every call and goes through them one by one.

    Args:
        back: the inverse, [M]: for each row of x the one entry that takes it.
    """
    return _take(x, places) if traced() else _Take.apply(x, places, back)


def _take(x: Tensor, places: Places) -> Tensor:
    if not len(x):
        return x.new_zeros(len(places.rows), *x.shape[1:])
    taken = x.index_select(0, places.rows)
    return taken if places.empty is None else taken.index_fill_(0, places.empty, 0)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, back: Places) -> Tensor:
        ctx.places, ctx.back = places, back
        return _take(x, places)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(g, ctx.back, ctx.places), None, None
