"""Settings that need no tuning, chosen from the evaluations; `Learner.auto`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any

import torch

from nested_learning._errors import unknown
from nested_learning.continual.files import check_file_dtype
from nested_learning.continual.learner import Learner
from nested_learning.continual.level import Level, check_levels
from nested_learning.continual.stack import stack_levels

LEVEL_FIELDS = tuple(each.name for each in fields(Level))
STACK_OPTIONS = tuple(
    name for name in signature(stack_levels).parameters if name not in ("model", "tokenizer")
)


@dataclass(frozen=True)
class AutoSettings:
    """Settings of a learner, and where they come from.

    Attributes:
        levels: the levels.
        file_dtype: precision of the memory files.
        options: further arguments of `stack_levels`.
        reason: why these, and what was not measured.
        source: the evaluation that has the figures.
    """

    levels: tuple[Level, ...]
    file_dtype: torch.dtype | None
    reason: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


# The one place where the choice stands. A file for SmolLM2-135M: 3 MB of deltas, 6 of Adam's states and 24 of
# keys and values at the end of a window.
AUTO = AutoSettings(
    levels=(Level(chunk_size=256, lr=4e-3, rule="adam", rank=8),),
    file_dtype=torch.bfloat16,
    reason="On six long documents that the model cannot have read one level of rank 8 takes 0.036 bits per "
    "byte less than its window of 1,024 alone, tuned dynamic evaluation 0.021, LoRA of that rank 0.035, a "
    "full delta 0.039, a sparse one 0.039, two full ones that differ in speed 0.045; but the files of full "
    "ones have 950 MB. Of the rates 5e-4 to 8e-3 this one is the best on the documents that settings are "
    "chosen on, and of 1e-3 to 4e-3 the best for facts told in 8,192 tokens, damage counted. It does not "
    "recall them, though: 0.05 of those told four times, where a full level recalls 0.33, with replay "
    "0.38, and retrieval 0.93; for facts retrieve, or take full deltas and replay. Of what a user tells in a "
    "month it recalls 0.331, a full level 0.608, two that differ in speed 0.708. Not measured at rank 8: "
    "classes, languages.",
    source="nested-learning eval longdoc facts-8k month --budget small: docs/log.md, 2026-11-29 and -30",
)


def auto(model: Any, tokenizer: Any = None, **changes: Any) -> Learner:
    """A learner with settings that need no tuning: the best known ones whose file stays within 40 MB for
    SmolLM2-135M. `nested_learning.continual.auto.AUTO` has them with the reason and the evaluation.

    Args:
        model: a transformers causal language model, as for `stack_levels`.
        tokenizer: tokenizer for text; None if only ids come.
        changes: arguments of `stack_levels`, fields of `Level` for all levels (`rank=16`), or `file_dtype`
            (None for exact files).

    Raises:
        ValueError: there is no such setting, or as `stack_levels`.
    """
    known = (*STACK_OPTIONS, *LEVEL_FIELDS, "file_dtype")
    for name in changes:
        if name not in known:
            raise unknown("setting", name, known)
    file_dtype = changes.pop("file_dtype", AUTO.file_dtype)
    check_file_dtype(file_dtype)
    of_levels = {name: changes.pop(name) for name in LEVEL_FIELDS if name in changes}
    levels = [replace(level, **of_levels) for level in check_levels(changes.pop("levels", AUTO.levels))]
    learner = stack_levels(model, tokenizer, levels=levels, **{**AUTO.options, **changes})
    learner.memory.file_dtype = file_dtype
    return learner


Learner.auto = staticmethod(auto)  # here, since `stack_levels` makes learners and so cannot be known to them
