"""From what callers say about documents in a row to where they begin (spec section 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.ops.documents import Documents

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def find_documents(
    x: Tensor,
    real: Tensor | None,
    given: bool,
    documents: Tensor | Documents | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    keep: bool = True,
) -> Documents | None:
    """The documents of a call, None where each row is at most one that needs no treatment of its own.

    Waits for the device once where something is said.

    Long: the callers pass what their own callers may say.

    Args:
        x: [B, T, ...], the call's tokens.
        real: [B, T] bool, False = padding; None: there is none.
        given: whether there is a state that the rows go on with.
        documents: [B, T] or [1, T] int, constant within a document and another in the next one; a row's first
            document goes on with its state. Or what this function returned before.
        position_ids: [B, T] or [1, T] int; a real token at 0 begins a document, also where it is its row's
            first and there is a state. Those of padding are ignored.
        seq_idx: as `documents`.
        cu_seq_lens: [documents + 1] int, the first column of each document and T, where B = 1.
        keep: whether the states after the call are wanted.

    Raises:
        ValueError: for values that do not fit x, and where two of them disagree about a boundary.
    """
    if isinstance(documents, Documents):
        check_documents(x, documents)
        return documents if len(documents) else None
    said: dict[str, Tensor] = {}
    begins = None
    if documents is not None:
        said["documents"] = _changes(_checked("documents", documents, x), real)
    if seq_idx is not None:
        said["seq_idx"] = _changes(_checked("seq_idx", seq_idx, x), real)
    if cu_seq_lens is not None:
        said["cu_seq_lens"] = _changes(_numbers(cu_seq_lens, x), real)
    if position_ids is not None:
        begins = _checked("position_ids", position_ids, x) == 0
        begins = begins if real is None else begins & real
        said["position_ids"] = begins & ~_first(begins, real)
    if not said:
        return None
    inside = next(iter(said.values()))
    for name, other in said.items():
        if not torch.equal(other, inside):
            raise ValueError(
                f"{next(iter(said))} and {name} disagree about where documents begin; give one of them"
            )
    found = Documents(inside if begins is None else begins, real, keep)
    plain = len(found) == len(found.rows.unique()) and (not given or bool(found.goes_on(True).all()))
    return None if plain or not len(found) else found


def check_documents(
    x: Tensor, documents: Tensor | Documents | None = None, position_ids: Tensor | None = None
) -> None:
    """ValueError for what does not fit x [B, T, ...]. Does not wait for the device."""
    if isinstance(documents, Documents):
        if documents.shape != x.shape[:2]:
            raise ValueError(f"documents are those of {[*documents.shape]} tokens, x has {[*x.shape[:2]]}")
    elif documents is not None:
        _checked("documents", documents, x)
    if position_ids is not None:
        _checked("position_ids", position_ids, x)


def _checked(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` as [B, T] on x's device; [B] will do for one token per row."""
    B, T = x.shape[:2]
    if T == 1 and isinstance(value, Tensor) and value.dim() == 1:
        value = value.unsqueeze(1)
    shapes = ([B, T], [1, T])
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or list(value.shape) not in shapes:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be an integer tensor [batch, tokens] = {[B, T]}, or {[1, T]} for all, got {got}"
        )
    return value.to(x.device).expand(B, T)


def _numbers(cu_seq_lens: Tensor, x: Tensor) -> Tensor:
    """[1, T], the number of each token's document."""
    B, T = x.shape[:2]
    if B != 1:
        raise ValueError(
            f"cu_seq_lens cut one row into documents, but there are {B}: put all tokens into one, or give "
            "position_ids"
        )
    bounds = cu_seq_lens.tolist() if isinstance(cu_seq_lens, Tensor) and cu_seq_lens.dim() == 1 else []
    if not bounds or bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        got = bounds or cu_seq_lens
        raise ValueError(f"cu_seq_lens must rise from 0 to the number of tokens {T}, got {got}")
    columns = torch.arange(T, device=x.device)
    return torch.bucketize(columns, cu_seq_lens.to(x.device, torch.long), right=True).unsqueeze(0)


def _changes(number: Tensor, real: Tensor | None) -> Tensor:
    """[B, T] bool, real tokens whose number is not that of the real token before them in the row."""
    if real is None:
        changes = torch.zeros_like(number, dtype=torch.bool)
        changes[:, 1:] = number[:, 1:] != number[:, :-1]
        return changes
    columns = torch.arange(number.shape[1], device=number.device)
    latest = torch.where(real, columns, -1).cummax(1).values  # the last real token up to each column
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    return real & (before >= 0) & (number != number.gather(1, before.clamp_min(0)))


def _first(like: Tensor, real: Tensor | None) -> Tensor:
    """[B, T] bool, each row's first real token."""
    if real is None:
        first = torch.zeros_like(like)
        first[:, :1] = True
        return first
    return real & (real.cumsum(1) == 1)
