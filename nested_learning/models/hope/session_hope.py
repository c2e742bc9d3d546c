"""A text that a Hope model has read: its cache, the tokens not read yet, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open

from nested_learning._tensor_files import parse_json
from nested_learning.models.hope.cache_hope import HopeCache

PENDING = "pending_ids"  # metadata key: ids that belong to the text but were not fed to the model yet


@dataclass(frozen=True)
class HopeSession:
    """One text as far as a model has read it.

    The last token as a rule is pending: what follows it is predicted when it is fed, before the next ones.

    Attributes:
        cache: states after the tokens that were fed; empty, or of one row.
        pending: ids that belong to the text but were not fed yet.
        notes: metadata of the file that it came from, or goes to.
    """

    cache: HopeCache
    pending: tuple[int, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        fed = 0 if self.cache.tokens_seen is None else int(self.cache.tokens_seen[0])
        return fed + len(self.pending)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to one safetensors file, which `HopeCache.load` reads as well.

        Raises:
            ValueError: nothing was fed yet, or the path is that of a folder, a device or a pipe.
            OSError: the file cannot be written; an earlier one of that name is left as it was.
        """
        self.cache.save(path, {**self.notes, PENDING: json.dumps(list(self.pending))})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> HopeSession:
        """The session in a file, on the model's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of a model with another configuration, or of several rows.
        """
        cache = HopeCache.load(path, model)
        if cache.batch_size != 1:
            raise ValueError(
                f"{os.fspath(path)} holds {cache.batch_size} texts side by side, expected one conversation"
            )
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
        return cls(cache, _read_pending(path, notes.get(PENDING, "[]"), model.config.vocab_size), notes)


def _read_pending(path: str | os.PathLike[str], text: str, vocab_size: int) -> tuple[int, ...]:
    """The ids that were not fed yet. ValueError for anything but a list of ids of the vocabulary."""
    path = os.fspath(path)
    try:
        pending = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its {PENDING} is no JSON: {error}") from error
    if not isinstance(pending, list) or not all(type(i) is int and 0 <= i < vocab_size for i in pending):
        raise ValueError(
            f"{path} is damaged: its {PENDING} is {text[:60]}, expected a list of ids from 0 to "
            f"{vocab_size - 1}"
        )
    return tuple(pending)
