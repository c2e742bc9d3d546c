"""A learner as a memory file describes it, for whoever has the file and the base model alone."""

from __future__ import annotations

import os
from typing import Any

import torch

from nested_learning._tensor_files import parse_json, read_tensors
from nested_learning.continual.files import FORMAT, PRECISION
from nested_learning.continual.learner import Learner
from nested_learning.continual.level import Level
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.stack import stack_levels

READING = {"segment", "window", "overlap"}
LATER = {"distill_top_k"}  # settings of reading that not every file has


def reopen(
    path: str | os.PathLike[str],
    model: Any,
    tokenizer: Any = None,
    *,
    replay: Replay | None = None,
    **others: Any,
) -> Learner:
    """The learner that wrote a memory file, with that memory: levels and way of reading are the file's.

    Args:
        path: path of a file that `learner.memory.save` wrote.
        model: the base model that it was learned on.
        tokenizer: tokenizer for text; None if only ids come.
        replay: how replay goes on; None for its defaults where the file has a store, and none elsewhere.
        others: `background`, `fisher` and `starts` of a learner that had them, or `compile`, as for
            `stack_levels`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another base model; or it does not tell its learner, which had
            an inner rule that is no name, or chose modules in a way that cannot be told from their names.
    """
    tensors, metadata = read_tensors(path, "memory")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} is a safetensors file, but not the memory of a learner")
    try:
        levels, reading, weights = (parse_json(metadata[key]) for key in ("levels", "reading", "weights"))
        if not isinstance(levels, list) or not isinstance(reading, dict) or set(reading) - LATER != READING:
            raise ValueError(f"levels are {levels!r} and reading is {reading!r}"[:200])
        if any(type(value) is not int for value in reading.values()):
            raise ValueError(f"reading is {reading!r}"[:200])
        settings = [Level(**level) for level in levels]
        if replay is None and any("store" in row for row in parse_json(metadata["rows"])):  # type: ignore[attr-defined]
            replay = Replay(piece=min(Replay.piece, reading["window"]))
        modules = sorted({name.removesuffix(".weight") for names in weights for name in names})  # type: ignore[attr-defined]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)} does not tell the levels of its learner ({error}): make that learner by "
            "stack_levels with its own settings, and load the file"
        ) from error
    options = {**reading, **others, "replay": replay}
    for chosen in (None, modules):
        try:
            learner = stack_levels(model, tokenizer, levels=settings, modules=chosen, **options)
        except ValueError:
            if chosen is None:
                raise
            break  # a model without these modules
        if [[target.name for target in w.targets] for w in learner.reader.writers] == weights:
            learner.memory.load(path)
            # files of 0.1.0 tell it by their deltas alone, if they have one
            deltas = {str(t.dtype) for name, t in tensors.items() if "/delta/" in name}
            if str(torch.bfloat16) in {metadata.get(PRECISION), *deltas}:
                learner.memory.file_dtype = torch.bfloat16  # no more bits than there were
            return learner
    raise ValueError(
        f"{os.fspath(path)} is of a learner on other weights than {type(model).__name__} has for its levels: "
        "make that learner by stack_levels with its own modules, and load the file"
    )
