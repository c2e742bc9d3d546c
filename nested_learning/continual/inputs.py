"""What users hand over, text or ids in several shapes, to rows of ids, and results back to those shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Mask = Tensor | Sequence[Any]
TextOrIds = str | Tensor | Sequence[int] | Sequence[str] | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """Rows of ids.

    Attributes:
        rows: ids [T_i] of each row.
        kind: "one" sequence, a "list" of them, or a "matrix" [B, T].
    """

    rows: list[Tensor]
    kind: str

    def restore(self, results: list[Tensor]) -> Any:
        """One result per row in the shape of the input: a tensor, or a list of them for a "list"."""
        if self.kind == "one":
            return results[0]
        return torch.stack(results) if self.kind == "matrix" else results


def read_batch(given: TextOrIds, tokenizer: Any, vocab_size: int, device: torch.device) -> Batch:
    """Text or ids as rows of ids on the device.

    Text is encoded without special tokens, as a continuation of what came before; to have them, give ids.

    Args:
        given: a text, ids [T] (tensor or list), a list of texts or of ids, or ids [B, T].
        tokenizer: for text; may be None when only ids come.
        vocab_size: ids of the model.
        device: of the model.

    Raises:
        ValueError: text without a tokenizer, an empty text, ids that are no whole numbers or outside the
            vocabulary.
    """
    if isinstance(given, Tensor):
        if given.ndim not in (1, 2):
            raise ValueError(f"ids must be [T] or [B, T], got shape {tuple(given.shape)}")
        rows, kind = (list(given), "matrix") if given.ndim == 2 else ([given], "one")
    elif isinstance(given, str):
        rows, kind = [_encode(given, tokenizer)], "one"
    elif isinstance(given, Sequence) and given and all(isinstance(item, int) for item in given):
        rows, kind = [torch.tensor(given)], "one"
    elif isinstance(given, Sequence) and given:
        convert: Callable[[Any], Tensor] = lambda item: (  # noqa: E731
            _encode(item, tokenizer) if isinstance(item, str) else torch.as_tensor(item)
        )
        rows, kind = [convert(item) for item in given], "list"
    else:
        raise ValueError(f"expected a text, ids, or a list of them, got {given!r}")
    return Batch([_checked(row, vocab_size).to(device) for row in rows], kind)


def read_masks(given: Mask | None, text_or_ids: TextOrIds, batch: Batch) -> list[Tensor]:
    """Which tokens of each row are learned: bool [T_i] on the CPU.

    Args:
        given: of the shape of the ids, bool or 0 and 1; None for all True.
        text_or_ids: that `batch` was read from.
        batch: rows of ids.

    Raises:
        ValueError: a mask for text, of another shape, or with other values.
    """
    if given is None:
        return [torch.ones(len(row), dtype=torch.bool) for row in batch.rows]
    if isinstance(text_or_ids, str) or (
        batch.kind == "list" and any(isinstance(item, str) for item in text_or_ids)
    ):
        raise ValueError("learn_mask has one value per token: give ids, not text, to go with it")
    try:
        masks = [torch.as_tensor(mask) for mask in ([given] if batch.kind == "one" else given)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"learn_mask must have the shape of the ids, got {given!r}") from error
    shapes, expected = [tuple(m.shape) for m in masks], [tuple(row.shape) for row in batch.rows]
    if shapes != expected:
        raise ValueError(f"learn_mask must have the shape of the ids, rows of {expected}, got {shapes}")
    wrong = [value for mask in masks for value in mask[(mask != 0) & (mask != 1)].tolist()]
    if wrong:
        raise ValueError(
            f"learn_mask must be True or 1 for tokens that are learned, False or 0 for others, got {wrong[0]}"
        )
    return [mask.to("cpu", torch.bool) for mask in masks]


def _encode(text: str, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ValueError(
            "got a text, but there is no tokenizer: give ids, or pass a tokenizer to stack_levels"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; expected at least one")
    return torch.tensor(ids)


def _checked(ids: Tensor, vocab_size: int) -> Tensor:
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers [T], got shape {tuple(ids.shape)} of {ids.dtype}")
    if not len(ids):
        raise ValueError("got a sequence without tokens; expected at least one")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids must be from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    return ids.long()
