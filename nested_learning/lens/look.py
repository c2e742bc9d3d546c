"""The one call: a model or a learner, a text, a recording."""

from __future__ import annotations

from typing import Any

from nested_learning._checks import check_text
from nested_learning.continual import Learner
from nested_learning.lens.of_learner import record_learner
from nested_learning.lens.record import record
from nested_learning.lens.recording import Recording


def lens(
    model_or_learner: Any,
    text_or_ids: Any,
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> Recording:
    """See what a model does with a text: a recording, which a notebook shows and `save` writes.

    Args:
        model_or_learner: a `HopeForCausalLM`, or the `Learner` of a pretrained model; left as it was.
        text_or_ids: a text, which is read without special tokens, or ids [T].
        tokenizer: of a Hope model; a learner has its own.
        max_tokens: read no more than the first so many; None for all.

    Raises:
        ValueError: a model of another kind, a text without a tokenizer, fewer than two tokens.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"max_tokens must be at least 2, got {max_tokens}: the first token predicts the second"
        )
    learner = isinstance(model_or_learner, Learner)
    if learner and tokenizer is None:
        tokenizer = model_or_learner.tokenizer
    ids = text_or_ids
    if isinstance(ids, str):
        if tokenizer is None:
            raise ValueError("got a text, but no tokenizer: give one, or ids")
        check_text(ids)
        ids = tokenizer(ids, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError(
                f"the text has {len(ids)} token(s); it needs two: the first one predicts the second"
            )
    ids = ids if max_tokens is None else ids[:max_tokens]
    if learner:
        return record_learner(model_or_learner, ids)
    return record(model_or_learner, ids, tokenizer)
