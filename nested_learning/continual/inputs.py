"""The inputs of users, text or ids in several shapes, as rows of ids; results in those shapes again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nested_learning._checks import check_text

LearnMask = Tensor | Sequence[Any]
Names = str | Sequence[str | None] | None
_NEW_TOKENS = 20  # of transformers' `generate` where nothing says how many
UNBOUNDED = 2**31  # positions of a model that does not say how many it has
TextOrIds = str | Tensor | Sequence[int] | Sequence[str] | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """Rows of ids.

    Attributes:
        rows: ids [T_i] of each row, on the model's device.
        learn: which tokens of each row are learned, bool [T_i] on the CPU.
        kind: "one" sequence, a "list" of them, or a "matrix" [B, T].
    """

    rows: list[Tensor]
    learn: list[Tensor]
    kind: str

    def restore(self, results: list[Tensor]) -> Any:
        """One result per row in the shape of the input: a tensor, or a list of them for a "list"."""
        if self.kind == "one":
            return results[0]
        return torch.stack(results) if self.kind == "matrix" else results


def read_batch(given: TextOrIds, tokenizer: Any, model: Any, learn_mask: LearnMask | None = None) -> Batch:
    """Text or ids as rows of ids on the device.

    Text is encoded without special tokens, as a continuation of what came before; to have them, give ids.

    Args:
        given: a text, ids [T] (tensor or list), a list of texts or of ids, or ids [B, T].
        tokenizer: tokenizer for text; may be None when only ids come.
        model: the model that will read them, a PreTrainedModel with its vocabulary and device.
        learn_mask: which tokens are learned, of the shape of the ids, bool or 0 and 1; None for all.

    Raises:
        ValueError: text without a tokenizer, an empty text, ids that are no whole numbers or outside the
            vocabulary; a mask for text, of another shape, or with other values.
    """
    if isinstance(given, np.ndarray):
        given = _ids(given)
    if isinstance(given, Tensor):
        if given.ndim not in (1, 2) or (given.ndim == 2 and not len(given)):
            raise ValueError(f"ids must be [T] or [B, T], got shape {tuple(given.shape)}")
        rows, kind = (list(given), "matrix") if given.ndim == 2 else ([given], "one")
    elif isinstance(given, str):
        rows, kind = [_encode(given, tokenizer)], "one"
    elif isinstance(given, bytes) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"expected a text, ids, or a list of them, got {given!r}")
    elif all(isinstance(item, Integral) and not isinstance(item, bool) for item in given):
        rows, kind = [_ids([int(item) for item in given])], "one"  # type: ignore[arg-type]
    else:
        rows, kind = [_encode(x, tokenizer) if isinstance(x, str) else _ids(x) for x in given], "list"
    vocab_size = vocabulary_size(model)
    rows = [_checked(row, vocab_size).to(model.device) for row in rows]
    if learn_mask is None:
        return Batch(rows, [torch.ones(len(row), dtype=torch.bool, device="cpu") for row in rows], kind)
    if isinstance(given, str) or (kind == "list" and any(isinstance(item, str) for item in given)):
        raise ValueError("learn_mask has one value per token: give ids, not text, to go with it")
    return Batch(rows, _read_mask(learn_mask, rows, kind), kind)


def read_one(what: str, given: TextOrIds, tokenizer: Any, model: Any) -> Tensor:
    """Ids [T] of one text, as `read_batch` takes it; ValueError for several. `what`: its word in messages."""
    batch = read_batch(given, tokenizer, model)
    if batch.kind != "one":
        raise ValueError(f"{what} must be one text or ids [T], got {len(batch.rows)} sequences in a list")
    return batch.rows[0]


def _ids(given: Any) -> Tensor:
    """Ids of a list or an array as a tensor. ValueError for what is none."""
    try:
        return _tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"expected a text, ids, or a list of them, got {given!r}") from error


def _tensor(given: Any) -> Tensor:
    return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")


def _read_mask(learn_mask: LearnMask, rows: list[Tensor], kind: str) -> list[Tensor]:
    try:
        learn = [_tensor(mask) for mask in ([learn_mask] if kind == "one" else learn_mask)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"learn_mask must have the shape of the ids, got {learn_mask!r}") from error
    shapes, expected = [tuple(mask.shape) for mask in learn], [tuple(row.shape) for row in rows]
    if shapes != expected:
        raise ValueError(f"learn_mask must have the shape of the ids, rows of {expected}, got {shapes}")
    wrong = [value for mask in learn for value in mask[(mask != 0) & (mask != 1)].tolist()]
    if wrong:
        raise ValueError(
            f"learn_mask must be True or 1 for tokens that are learned, False or 0 for others, got {wrong[0]}"
        )
    return [mask.to("cpu", torch.bool) for mask in learn]


def read_names(what: str, given: Names, count: int) -> list[str | None]:
    """One name for each of `count` sequences.

    Args:
        what: word for the names, for messages: "source", "label".
        given: one name for all, one for each, or None for no name.
        count: number of sequences.

    Raises:
        ValueError: a name is no text or an empty one, or there are more or fewer of them than sequences.
    """
    names: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * count
    wrong = [name for name in names if name is not None and not (isinstance(name, str) and name)]
    if wrong:
        raise ValueError(f"{what} must be a text of at least one character, got {wrong[0]!r}")
    if len(names) != count:
        raise ValueError(
            f"got {len(names)} names in {what} for {count} sequence(s); give one, or one for each"
        )
    return names


def _encode(text: str, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ValueError(
            "got a text, but there is no tokenizer: give ids, or pass a tokenizer to stack_levels"
        )
    check_text(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; expected at least one")
    return torch.tensor(ids, device="cpu")


def checked_index(what: str, index: Any, count: int) -> int:
    """An index from 0 to `count` − 1; ValueError for anything else. `what` it is of, for the message."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        fastest = " (the fastest)" if what == "level" else ""
        raise ValueError(f"{what} must be from 0{fastest} to {count - 1}, got {index!r}")
    return index


def _checked(ids: Tensor, vocab_size: int) -> Tensor:
    if ids.is_meta or ids.layout != torch.strided:
        raise ValueError(f"ids must be a dense tensor with values, got {ids.layout} on {ids.device}")
    if ids.shape == (0,):
        raise ValueError("got a sequence without tokens; expected at least one")
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers [T], got shape {tuple(ids.shape)} of {ids.dtype}")
    ids = ids.long()  # first, for unsigned types know no order
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids must be from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    return ids.clone() if ids.is_inference() else ids


@contextmanager
def fitting(model: Any, what: str, length: int) -> Iterator[None]:
    """Say so where a model fails inside the scope for lack of learned positions for so many tokens; models
    that compute their positions read on beyond those that they were trained on.

    Raises:
        ValueError: the model has learned positions, and fewer of them.
    """
    try:
        yield
    except IndexError as error:
        if length <= (limit := most_positions(model)):
            raise
        raise ValueError(
            f"{what} has {length} tokens, and {type(model).__name__} has {limit} positions; give a part of it"
        ) from error


def generated_tokens(model: Any, prompt: int, options: Mapping[str, Any]) -> int:
    """Most tokens that transformers' `generate` makes of so many of a prompt, these included.

    Args:
        model: any that generates.
        prompt: its tokens.
        options: of `generate`, which go before the model's own settings.
    """
    settings = options.get("generation_config") or getattr(model, "generation_config", None)
    new, whole = (
        getattr(settings, name, None) if options.get(name) is None else options[name]
        for name in ("max_new_tokens", "max_length")
    )
    return prompt + new if new else max(whole or prompt + _NEW_TOKENS, prompt)


def vocabulary_size(model: Any) -> int:
    """Number of ids that a model reads."""
    return int(model.get_input_embeddings().weight.shape[0])


def most_positions(model: Any) -> int:
    """Most tokens that a model reads at once; `UNBOUNDED` where its configuration does not say."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else UNBOUNDED
