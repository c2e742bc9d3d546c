"""The store of a row in a memory file: tensors and fields, each checked before a store is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.replaying.store import (
    REASONS,
    Count,
    KeptExample,
    NamedRun,
    Store,
    compact_dtype,
)

FIELDS = {"reason", "sources", "labels", "runs"}
MOST_TOKENS = 2**53
# One value for each example; tokens and masks of all examples lie one after the other.
COLUMNS = {
    "length": torch.int32,
    "start": torch.int64,
    "source": torch.int32,
    "label": torch.int32,
    "begins": torch.bool,
    "loss": torch.float64,
}


def store_tensors(store: Store) -> dict[str, Tensor]:
    """Tensors of a store by their names in the file; none without examples."""
    if not store.examples:
        return {}
    sources, labels = _numbered(store.counts), _numbered(_labels(store))
    rows = [(len(e), e.start, sources[e.source], labels[e.label], e.begins, e.loss) for e in store.examples]
    columns = zip(COLUMNS.items(), zip(*rows, strict=True), strict=True)
    tensors = {name: torch.tensor(values, dtype=dtype, device="cpu") for (name, dtype), values in columns}
    tensors["tokens"] = torch.cat([e.tokens for e in store.examples])
    tensors["mask"] = torch.cat([e.learn for e in store.examples])
    return {f"store/{name}": tensor for name, tensor in tensors.items()}


def store_fields(store: Store) -> dict[str, Any]:
    """Everything of a store that is no tensor, as JSON values."""
    sources, labels = _numbered(store.counts), _numbered(_labels(store))
    return {
        "reason": store.reason,
        "sources": [[name, *count] for name, count in store.counts.items()],
        "labels": list(labels),
        "runs": [[run.start, sources[run.source], labels[run.label]] for run in store.runs],
    }


def _labels(store: Store) -> list[str | None]:
    return [*(example.label for example in store.examples), *(run.label for run in store.runs)]


def _numbered(names: Any) -> dict[str | None, int]:
    """Names with the places at which they come first."""
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


class SavedStore:
    """Makes the store of one row of what a file holds.

    Args:
        left: tensors of the file; those of the store are taken out.
        prefix: beginning of their names.
        vocab_size: number of ids of the vocabulary.
        longest: most tokens of an example.
    """

    def __init__(self, left: dict[str, Tensor], prefix: str, vocab_size: int, longest: int) -> None:
        self._left = left
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._longest = longest

    def read(self, fields: Any, position: int, complete: int) -> Store:
        """The store of a row at `position`, of whose tokens `complete` lie in complete segments.

        Raises:
            ValueError: a field is missing, too many, of another kind, out of range or of another shape.
        """
        if not isinstance(fields, dict) or set(fields) != FIELDS:
            raise ValueError(f"{self._prefix[:-1]} is {fields!r:.80}, expected the fields {sorted(FIELDS)}")
        if fields["reason"] not in ("", *REASONS):
            raise ValueError(
                f"reason is {fields['reason']!r:.80}, expected one of {', '.join(REASONS)} or ''"
            )
        counts = self._counts(fields["sources"], position)
        labels = self._names("labels", fields["labels"])
        runs = self._runs(fields["runs"], list(counts), labels, position, complete)
        examples = self._examples(list(counts), labels, complete)
        if not fields["reason"]:
            gaps = [e.start for before, e in pairwise(examples) if before.end != e.start]
            ends = (examples[0].start, examples[-1].end) if examples else (0, 0)
            if gaps or ends != (0, complete):
                raise ValueError(
                    f"{self._prefix}start has gaps, or not the tokens from 0 to {complete}, but no reason "
                    "says that the store lacks any"
                )
        return Store(tuple(examples), tuple(runs), counts, fields["reason"])

    def _counts(self, given: object, position: int) -> dict[str | None, Count]:
        rows: list[Any] = given if isinstance(given, list) else [given]
        if not all(isinstance(row, list) and len(row) == 3 for row in rows):
            raise ValueError(f"sources is {given!r:.80}, expected a list of [name, tokens, writes]")
        names = self._names("sources", [row[0] for row in rows])
        for _, *numbers in rows:
            self._whole("sources", numbers, 0, MOST_TOKENS)
        if sum(row[1] for row in rows) > position:
            raise ValueError(f"sources has more tokens than the {position} that were read")
        return {name: Count(*row[1:]) for name, row in zip(names, rows, strict=True)}

    def _names(self, what: str, given: object) -> list[str | None]:
        if (
            not isinstance(given, list)
            or not all(name is None or (isinstance(name, str) and name) for name in given)
            or len(set(given)) < len(given)
        ):
            raise ValueError(f"{what} is {given!r:.80}, expected a list of names, none of them twice")
        return given

    def _runs(
        self,
        given: object,
        sources: Sequence[str | None],
        labels: Sequence[str | None],
        position: int,
        complete: int,
    ) -> list[NamedRun]:
        if not isinstance(given, list) or not all(isinstance(run, list) and len(run) == 3 for run in given):
            raise ValueError(f"runs is {given!r:.80}, expected a list of [start, source, label]")
        for start, source, label in given:
            self._whole("runs", [start], 0, position - 1)
            self._whole("runs", [source], 0, len(sources) - 1)
            self._whole("runs", [label], 0, len(labels) - 1)
        starts = [run[0] for run in given]
        if any(a >= b for a, b in pairwise(starts)) or (position > complete and starts[:1] > [complete]):
            raise ValueError(f"runs is {given!r:.80}, expected ascending starts, the first by {complete}")
        if bool(position) != bool(given):
            raise ValueError(f"runs is {given!r:.80}, expected those of {position} tokens")
        return [NamedRun(start, sources[source], labels[label]) for start, source, label in given]

    def _examples(
        self, sources: Sequence[str | None], labels: Sequence[str | None], complete: int
    ) -> list[KeptExample]:
        if f"{self._prefix}length" not in self._left:
            return []
        found = {name: self._column(name, dtype) for name, dtype in COLUMNS.items()}
        count = len(found["length"])
        if any(len(column) != count for column in found.values()):
            raise ValueError(
                f"{self._prefix}* have {[len(c) for c in found.values()]} values, expected as many"
            )
        columns = {name: column.tolist() for name, column in found.items()}
        self._whole("length", columns["length"], 1, self._longest)
        self._whole("start", columns["start"], 0, complete)
        self._whole("source", columns["source"], 0, len(sources) - 1)
        self._whole("label", columns["label"], 0, len(labels) - 1)
        if any(loss < 0 for loss in columns["loss"]):
            raise ValueError(f"{self._prefix}loss has {min(columns['loss'])}, expected losses from 0")
        ends = [start + length for start, length in zip(columns["start"], columns["length"], strict=True)]
        if any(end > start for end, start in zip(ends, [*columns["start"][1:], complete], strict=False)):
            raise ValueError(f"{self._prefix}start has examples that overlap, or go beyond token {complete}")
        total = sum(columns["length"])
        tokens = self._column("tokens", compact_dtype(self._vocab_size), total)
        learn = self._column("mask", torch.bool, total)
        if not 0 <= int(tokens.long().min()) <= int(tokens.long().max()) < self._vocab_size:
            raise ValueError(f"{self._prefix}tokens has ids outside the vocabulary of {self._vocab_size}")
        parts = zip(tokens.split(columns["length"]), learn.split(columns["length"]), strict=True)
        names = zip(columns["start"], columns["source"], columns["label"], strict=True)
        rest = zip(columns["begins"], columns["loss"], strict=True)
        return [
            KeptExample(ids.clone(), mask.clone(), start, sources[source], labels[label], begins, loss)
            for (ids, mask), (start, source, label), (begins, loss) in zip(parts, names, rest, strict=True)
        ]

    def _column(self, name: str, dtype: torch.dtype, length: int | None = None) -> Tensor:
        full = self._prefix + name
        if full not in self._left:
            raise ValueError(f"{full} is missing")
        tensor = self._left.pop(full)
        if tensor.dtype != dtype or tensor.ndim != 1 or length not in (None, len(tensor)):
            kind = f"{str(dtype).removeprefix('torch.')} [{'n' if length is None else length}]"
            raise ValueError(f"{full} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {kind}")
        return tensor

    def _whole(self, name: str, values: Sequence[object], low: int, high: int) -> None:
        """Raise ValueError unless all are whole numbers from `low` to `high`."""
        for value in values:
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} has {value!r:.80}, expected whole numbers from {low} to {high}")
