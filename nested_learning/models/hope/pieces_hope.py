"""A call's columns in pieces: which of a mask are meant, and joining what the pieces gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# One segment's normalised output, hidden states and surprises.
Piece = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]


def join(pieces: list[Piece]) -> Piece:
    """Concatenate segments along the tokens."""
    if len(pieces) == 1:
        return pieces[0]

    def cat(parts: tuple[Any, ...]) -> Any:
        return None if parts[0] is None else torch.cat(parts, dim=1)

    outputs, hidden, surprise = zip(*pieces, strict=True)
    return (
        cat(outputs),
        tuple(map(cat, zip(*hidden, strict=True))),
        tuple(map(cat, zip(*surprise, strict=True))),
    )


def columns_of_this_call(attention_mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """[B, T] bool from a mask over this call's columns or over those seen so far and this call's."""
    if attention_mask is None:
        return None
    batch_size, length, _ = x.shape
    shapes = [[batch_size, length]] + ([[batch_size, seen + length]] if seen else [])
    if list(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {' or '.join(map(str, shapes))} (the new columns, or "
            f"those in the cache too), got {list(attention_mask.shape)}"
        )
    return attention_mask[:, -length:].bool()
