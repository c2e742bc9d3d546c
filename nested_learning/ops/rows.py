"""Trees of tensors whose first dimension is the batch: rows of them, and several as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def select_rows(tree: Any, rows: Tensor | slice) -> Any:
    """Rows of every tensor; what fields share stays shared, and all rows are the tensor itself.

    Args:
        tree: tensors [B, ...].
        rows: [n] int64, or a slice of the first ones.
    """
    done: dict[int, Tensor] = {}

    def select(t: Tensor) -> Tensor:
        if id(t) not in done:
            if isinstance(rows, Tensor):
                done[id(t)] = t.index_select(0, rows.to(t.device))
            else:
                done[id(t)] = t if rows.stop == len(t) else t[rows]
        return done[id(t)]

    return pytree.tree_map_only(Tensor, select, tree)


def join_rows(trees: Sequence[Any]) -> Any:
    """The rows of several trees as one; what fields share in all of them stays shared.

    Keys and values of attention grow: the shorter ones get padding in front, see `padded`. Dictionaries may
    have their keys in other orders, as those from a file have.
    """
    if len(trees) == 1:
        return trees[0]
    structure = pytree.tree_structure(trees[0])
    parts = list(zip(*(structure.flatten_up_to(tree) for tree in trees), strict=True))
    joined: dict[tuple[int, ...], Any] = {}
    for part in parts:
        key = tuple(map(id, part))
        if key not in joined:
            joined[key] = _cat(part) if isinstance(part[0], Tensor) else part[0]
    return pytree.tree_unflatten([joined[tuple(map(id, part))] for part in parts], structure)


def padded(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """`t` with padding in front of every dimension up to `sizes`: 0, in integers −1, no token's position."""
    missing = [
        n for size, have in zip(reversed(sizes), reversed(t.shape), strict=True) for n in (size - have, 0)
    ]
    return F.pad(t, missing, value=0 if t.is_floating_point() else -1) if any(missing) else t


def over_channels(index: Tensor, like: Tensor) -> Tensor:
    """[B, C] -> [B, C, channels] for gather and scatter along the tokens."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _cat(part: Sequence[Tensor]) -> Tensor:
    sizes = [max(n) for n in zip(*(t.shape[1:] for t in part), strict=True)]
    return torch.cat([padded(t, [len(t), *sizes]) for t in part])
