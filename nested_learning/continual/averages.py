"""Averages that answer: levels that follow a faster one, and stand in its place when the learner is asked.

A ← A + r (Δ − A) at the average's boundary. Full deltas, and products with one fixed factor, are averaged as
they are. With two learned factors the average of products has the sum of both ranks (as has what a level at
a rank takes over, `Level.consolidate`); it is brought back to the level's own rank by the best approximation
of that rank, from QR decompositions of the stacked factors and the singular values of the small matrix
between them: no matrix of the weight's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.continual.level import Level
from nested_learning.memory.state import Weights
from nested_learning.ops.context import full_precision


def answering(levels: Sequence[Level]) -> tuple[int, ...] | None:
    """Indices of the levels that are in force when a learner is asked; None where that is all of them.

    Where a level has several averages, the slowest one answers. The level itself is among the indices: it
    answers on those weights that its average does not have.
    """
    slowest = {level.average_of: index for index, level in enumerate(levels) if level.average_of is not None}
    if not slowest:
        return None
    return tuple(i for i, level in enumerate(levels) if level.average_of is None or i in slowest.values())


def chosen_levels(levels: Sequence[Level], given: Any) -> tuple[int, ...] | None:
    """Indices of the levels that are to answer, ascending; None for all that do by themselves.

    Raises:
        ValueError: there is no such level, or a level is asked for together with its average.
    """
    if given is None:
        return answering(levels)
    indices: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(levels) for i in indices):
        raise ValueError(
            f"levels must be a list of indices from 0 (the fastest) to {len(levels) - 1}, got {given!r}"
        )
    chosen = tuple(sorted(set(indices)))
    check_chosen(levels, chosen)
    return chosen


def check_chosen(levels: Sequence[Level], chosen: Collection[int]) -> None:
    """Raise ValueError where one of these levels is to stand in the place of another one of them."""
    first: dict[int, int] = {}
    for index in chosen:
        of = levels[index].average_of
        of = index if of is None else of
        if first.setdefault(of, index) != index:
            raise ValueError(
                f"levels {first[of]} and {index} are a level and its average, or two averages of one level; "
                "expected one of them: an average stands in the place of what it averages"
            )


class LowRank(NamedTuple):
    """A product up · down of rank r, [out, in].

    Attributes:
        down: [r, in], of stacked experts [E, r, in].
        up: [out, r], or [E, out, r].
    """

    down: Tensor
    up: Tensor


class Mixed(NamedTuple):
    """A mixture of two products at a rank, and what it cost.

    Attributes:
        product: the best approximation of the mixture.
        lost: squared Frobenius norm of what the rank could not hold, 0-D.
        whole: squared Frobenius norm of the mixture, 0-D.
    """

    product: LowRank
    lost: Tensor
    whole: Tensor


def mix(mine: LowRank, theirs: LowRank, kept: float, rate: float) -> Mixed:
    """kept · mine + rate · theirs at the rank of `mine`: its best approximation (Eckart and Young).

    `down` of the result has orthonormal rows.
    """
    rank = mine.down.shape[-2]
    with full_precision(mine.up.device):
        left = torch.cat([mine.up * kept, theirs.up * rate], dim=-1)
        right = torch.cat([mine.down, theirs.down], dim=-2)
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.mT)
        u, values, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        squares = values.square()
        down = (q_right @ v[..., :rank, :].mT).mT.contiguous()
        up = q_left @ (u[..., :rank] * values[..., None, :rank])
    return Mixed(LowRank(down, up), squares[..., rank:].sum(), squares.sum())


def mix_in(
    mine: Weights, slots: tuple[str, str], rank: int, theirs: LowRank, kept: float, rate: float
) -> Tensor:
    """Make a product, zero if the slots (down, up) have none, its mixture with another one; see `mix`.

    Returns:
        squared norms of what the rank could not hold and of the whole, [2].
    """
    down, up = slots
    *stack, _, inputs = theirs.down.shape
    own = LowRank(
        mine[down] if down in mine else theirs.down.new_zeros(*stack, rank, inputs),
        mine[up] if up in mine else theirs.up.new_zeros(*theirs.up.shape[:-1], rank),
    )
    mixed = mix(own, theirs, kept, rate)
    mine[down], mine[up] = mixed.product
    return torch.stack([mixed.lost, mixed.whole])


def relative(errors: Sequence[Tensor]) -> float:
    """√(lost / whole) of the sums of squares [2] of several mixtures; 0 where there is nothing."""
    lost, whole = torch.stack(list(errors)).sum(0).tolist() if errors else (0.0, 0.0)
    return math.sqrt(lost / whole) if whole else 0.0


def approach(mine: Weights, slot: str, theirs: Tensor | None, rate: float) -> None:
    """A ← A + rate · (Δ − A) for one slot, where a slot without an entry is zero."""
    if slot not in mine:
        if theirs is not None:
            mine[slot] = theirs * rate
    elif theirs is None:
        mine[slot].mul_(1 - rate)
    else:
        mine[slot].lerp_(theirs, rate)
