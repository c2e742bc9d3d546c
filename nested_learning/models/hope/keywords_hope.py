"""Keywords that callers of any transformers model pass: which mean nothing here, and which are refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# An unknown keyword as near as this to an argument of Hope's is taken for a typo of it. Names that other
# models have, such as `encoder_attention_mask` (0.78 from `attention_mask`), are further away.
_NEAR = 0.85
# What would change the result of another model, and cannot change Hope's: not to be passed over in silence.
_REFUSED = {
    "token_type_ids": "Hope has no token types; leave them away",
    "encoder_hidden_states": "Hope has no cross-attention; leave them away",
}

ID_DTYPES = (torch.int64, torch.int32)  # that an embedding reads


def check_keywords(given: Mapping[str, Any], own: Collection[str]) -> None:
    """Pass over keywords of other models, as all models of transformers do, but not over what was meant.

    Args:
        given: keywords that are no arguments of the call.
        own: names of the arguments that Hope's models have.

    Raises:
        TypeError: for what looks like a typo of an argument.
        ValueError: for a keyword whose meaning Hope cannot follow.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name in _REFUSED:
            raise ValueError(f"{name}: {_REFUSED[name]}")
        if name == "is_causal" and not value:
            raise ValueError("is_causal=False: a memory reads from left to right; leave is_causal away")
        if name in own or torch.compiler.is_compiling():  # difflib cannot be traced
            continue
        near = difflib.get_close_matches(name, own, n=1, cutoff=_NEAR)
        if near:
            raise TypeError(
                f"forward() got an unexpected keyword argument {name!r}; did you mean {near[0]!r}?"
            )


def wrong_input(given: Any, width: int | None) -> ValueError:
    """The error for an input that is neither ids [B, T] nor embeddings [B, T, width].

    Args:
        given: the input.
        width: that of embeddings; None for ids.
    """
    name = "input_ids" if width is None else "inputs_embeds"
    shape = "[batch, tokens]" if width is None else f"[batch, tokens, {width}]"
    if not isinstance(given, Tensor):
        return ValueError(
            f"{name} must be a tensor {shape}, got {type(given).__name__}; a tokenizer gives tensors with "
            "return_tensors='pt'"
        )
    if width is None and given.dtype not in ID_DTYPES:
        return ValueError(f"input_ids must be int64 or int32 token ids, got {given.dtype}; use .long()")
    hint = "; for one text, give it a batch dimension with [None]" if given.dim() == 1 else ""
    return ValueError(f"{name} must be {shape}, got {list(given.shape)}{hint}")


def check_positions(position_ids: Tensor, given: Tensor, real: Tensor | None) -> None:
    """ValueError unless positions say what Hope counts itself: one more for each token of a document.

    Where a row starts is free: the mask and the state say how many tokens came before. Later documents start
    at 0.

    Args:
        position_ids: [B, T] or [1, T] int; anything where a token is not real.
        given: [B, T] ids or [B, T, D] embeddings.
        real: [B, T] bool, False = padding; None: all are real.
    """
    rows, length = given.shape[:2]
    if list(position_ids.shape) not in ([rows, length], [1, length]):
        raise ValueError(
            f"position_ids must be [batch, tokens] = {[rows, length]}, got {list(position_ids.shape)}"
        )
    if length == 1 or torch.compiler.is_compiling() or isinstance(position_ids, FakeTensor):
        return
    wrong = (position_ids.diff(dim=1) != 1) & (position_ids[:, 1:] != 0)
    if real is not None:
        wrong = wrong & real[:, 1:] & real[:, :-1]
    if wrong.any():
        raise ValueError(
            "position_ids must go up by one from token to token, or start a document at 0: Hope counts them "
            "itself from attention_mask and the state"
        )
