"""Checks of the fields that HopeConfig shares with every configuration of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from nested_learning._checks import expected, fits, shown

MOST_LABELS = 10_000_000  # transformers writes a name for each of them
# Largest sizes: with them the number of weights of a matrix still has a place in 64 bits.
LARGEST_SIZES = {"vocab_size": 2**31 - 1, "hidden_size": 2**20, "num_hidden_layers": 100_000}
_FLOATING = {
    name: kind
    for name, kind in vars(torch).items()
    if isinstance(kind, torch.dtype) and (kind.is_floating_point or kind.is_complex)
}
_MAPPING, _FLAG = dict[Any, Any] | None, bool | None
_KINDS: dict[str, Any] = {
    "architectures": list[str] | None,
    "attn_implementation": str | dict[str, Any] | None,
    "auto_map": _MAPPING,
    "chunk_size_feed_forward": int | None,
    "custom_pipelines": _MAPPING,
    "experts_implementation": str | dict[str, Any] | None,
    "id2label": _MAPPING,
    "is_encoder_decoder": _FLAG,
    "label2id": _MAPPING,
    "num_labels": int | None,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "problem_type": Literal["regression", "single_label_classification", "multi_label_classification"] | None,
    "return_dict": _FLAG,
    "task_specific_params": _MAPPING,
    "tie_word_embeddings": _FLAG,
    "tokenizer_class": str | None,
    "use_cache": _FLAG,
}


def check_shared_fields(fields: Mapping[str, Any]) -> None:
    """Check those of the fields that are there; transformers uses them without a look.

    Raises:
        ValueError: a dtype, token id or label that is none.
    """
    for name, kind in _KINDS.items():
        if not fits(fields.get(name), kind):
            raise ValueError(f"{name} must be {expected(kind)}, got {shown(fields[name])}")
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is not None and not _is_dtype(value):
            raise ValueError(
                f"{name} must be a floating dtype of torch or its name, such as 'bfloat16', "
                f"got {shown(value)}"
            )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = fields.get(name)
        several = name == "eos_token_id" and isinstance(value, (list, tuple)) and len(value) > 0
        if value is not None and not all(map(_is_token_id, value if several else [value])):
            more = ", or a list of them," if name == "eos_token_id" else ""
            raise ValueError(f"{name} must be None or a token id{more} at least 0, got {shown(value)}")
    quantised = fields.get("quantization_config")
    if not (quantised is None or isinstance(quantised, dict) or hasattr(quantised, "to_dict")):
        raise ValueError(
            f"quantization_config must be None, a dict or a configuration, got {shown(quantised)}"
        )
    labels, names = fields.get("num_labels"), fields.get("id2label")
    if labels is not None and not 1 <= labels <= MOST_LABELS:
        raise ValueError(f"num_labels must be from 1 to {MOST_LABELS:,}, got {labels}")
    if names is not None and not all(_is_label(key, name) for key, name in names.items()):
        raise ValueError(f"id2label must map whole numbers to names, got {shown(names)}")


def check_numbers(name: str, value: Any) -> None:
    """Check that the numbers in options and levels fit the kernels that take them.

    Raises:
        ValueError: a whole number beyond 32 bits, or a finite one beyond float32.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            check_numbers(name, item)
    elif isinstance(value, int) and abs(value) >= 2**31:
        raise ValueError(f"{name} holds {shown(value)}; expected whole numbers below 2**31")
    elif isinstance(value, float) and FLOAT32 < abs(value) < math.inf:
        raise ValueError(f"{name} holds {value}; expected at most {FLOAT32:.3g}, the largest float32")


FLOAT32 = torch.finfo(torch.float32).max
_DEEP_INSIDE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
)


@contextmanager
def refusals(of: str, always: bool = False) -> Iterator[None]:
    """Errors that a value causes deep inside, as ValueErrors that say to what it was given.

    Args:
        of: what was built from the value.
        always: say so of a ValueError too, which else is left as it is.
    """
    try:
        yield
    except _DEEP_INSIDE as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        reason = str(cause).partition("\n")[0] or type(error).__name__  # torch adds its own stack
        raise ValueError(f"{of}: {reason}") from error
    except ValueError as error:
        if not always:
            raise
        raise ValueError(f"{of}: {error}") from error


def _is_dtype(value: Any) -> bool:
    return (
        value in _FLOATING.values()
        if isinstance(value, torch.dtype)
        else fits(value, str) and (value in _FLOATING or value == "auto")
    )


def _is_token_id(value: Any) -> bool:
    return fits(value, int) and value >= 0


def _is_label(key: Any, name: Any) -> bool:
    number = fits(key, int) or (isinstance(key, str) and key.isdecimal() and len(key) < 16)
    return number and fits(name, str)
