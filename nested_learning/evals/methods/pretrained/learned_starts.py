"""Levels that begin with rates and starts which were learned on texts of the kind that is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from nested_learning.continual import Level, Starts, learn_starts, stack_levels
from nested_learning.continual.files import fingerprint
from nested_learning.training.data.download import cache_folder

EIGHTH = 8  # one piece of so many is held out


def starts_for(
    model: Any,
    levels: Sequence[Level],
    reading: tuple[int, int],
    practice: Sequence[Sequence[int]],
    *,
    steps: int,
    **options: Any,
) -> Starts:
    """Rates and starts learned on pieces of the texts for practice; kept in the cache's folder.

    A piece is two windows long; every eighth, and one at least, is held out, and the step that is best on
    these is chosen.

    Args:
        model: the base model.
        levels: that are to begin with them.
        reading: positions of the window, and tokens of it that a new one begins with.
        practice: ids of texts, none of which is reported; ends that are shorter than a piece are left out.
        steps: of `learn_starts`, one piece each.
        options: others of `learn_starts`.

    Raises:
        ValueError: there are fewer than two pieces.
    """
    positions, overlap = reading
    piece = 2 * positions
    pieces = [
        torch.tensor(ids[start : start + piece])
        for ids in practice
        for start in range(0, len(ids) - piece + 1, piece)
    ]
    if len(pieces) < 2:
        raise ValueError(
            f"texts for practice of {[len(ids) for ids in practice]} tokens have {len(pieces)} pieces of two "
            f"windows ({piece} tokens); expected two or more: longer texts, or more of them"
        )
    count = max(1, len(pieces) // EIGHTH)
    held_out = sorted({len(pieces) * (2 * n + 1) // (2 * count) for n in range(count)})
    settings = {"held_out": held_out, "steps": steps, "reading": reading, **options}
    path = _path(fingerprint(model), levels, settings, pieces)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one of the processes that want the same starts learns them
        if not path.is_file():
            learner = stack_levels(model, levels=levels, window=positions, overlap=overlap)
            found = learn_starts(
                learner,
                [each for n, each in enumerate(pieces) if n not in held_out],
                held_out=[pieces[n] for n in held_out],
                steps=steps,
                **options,
            )
            found.save(path)
    return Starts.load(path)


def _path(model: str, levels: Sequence[Level], settings: Mapping[str, Any], pieces: Sequence[Tensor]) -> Path:
    """File of the starts, named by all that decides them."""
    told = [model, [each.describe() for each in levels], settings]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for ids in pieces:
        digest.update(ids.numpy().tobytes())
    return cache_folder() / "starts" / f"{digest.hexdigest()[:24]}.safetensors"
