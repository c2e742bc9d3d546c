"""The memory of a learner: the rows' deltas and all that goes with them, apart from the base model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nested_learning._files import write_tensors
from nested_learning.continual.context import Context
from nested_learning.continual.deltas import LevelState, Row
from nested_learning.continual.files import fingerprint, locked, read_tensors, to_json
from nested_learning.continual.reader import ReadingPlan
from nested_learning.continual.writing import LevelWriter, relay

FORMAT = "nested_learning.continual_memory"
VERSION = "1"


@dataclass(frozen=True)
class Snapshot:
    """The memory at one moment, for `Memory.restore`. It costs no memory until something is learned."""

    rows: list[Row]


class Memory:
    """What was learned on top of a base model, per row of the batch.

    Args:
        model: the base model; its parameters are never changed.
        writers: one per level.
        plan: how text is read.
    """

    def __init__(self, model: PreTrainedModel, writers: Sequence[LevelWriter], plan: ReadingPlan) -> None:
        self._model = model
        self._writers = writers
        self._plan = plan
        self._held: Path | None = None
        self.rows = self._new_rows(1)

    def __repr__(self) -> str:
        rows = ", ".join(f"{row.position:,} tokens" for row in self.rows)
        return f"Memory({len(self._writers)} levels; {rows}; {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of deltas, sums of unfinished chunks and states of the rules, of all rows."""
        return sum(
            t.numel() * t.element_size() for row in self.rows for state in row.levels for t in state.tensors()
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read yet."""
        return all(row.position == 0 for row in self.rows)

    def set_rows(self, count: int) -> None:
        """Make room for `count` rows, before anything is read.

        Raises:
            ValueError: the memory has another number of rows and has read something.
        """
        if count == len(self.rows):
            return
        if not self.is_empty:
            raise ValueError(
                f"got {count} row(s), but this memory has {len(self.rows)}; each row has deltas of its own, "
                "so their number is fixed by the first text. Make another learner on the same model, "
                "or reset() this one."
            )
        self.rows = self._new_rows(count)

    def _new_rows(self, count: int) -> list[Row]:
        return [Row.new(len(self._writers), self._model.device) for _ in range(count)]

    def row(self, index: int) -> Row:
        """What row `index` remembers. ValueError if there is no such row."""
        if not 0 <= index < len(self.rows):
            raise ValueError(f"row must be from 0 to {len(self.rows) - 1}, got {index}")
        return self.rows[index]

    # Undoing -------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The memory as it is now."""
        return Snapshot([row.share() for row in self.rows])

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, exactly. It can be restored any number of times."""
        self.rows = [row.share() for row in snapshot.rows]

    def reset(self, level: int | None = None) -> None:
        """Forget everything, or the delta, the unfinished chunk's sums and the rule's state of one level.

        Args:
            level: index of the level, 0 is the fastest; None for all, the place in the text included.

        Raises:
            ValueError: there is no such level.
        """
        if level is None:
            self.rows = self._new_rows(len(self.rows))
            return
        if not 0 <= level < len(self._writers):
            raise ValueError(f"level must be from 0 (the fastest) to {len(self._writers) - 1}, got {level}")
        for row in self.rows:
            relay(self._writers, row, level)  # what slower levels have yet to hear of
            row.levels[level] = LevelState()
            row.changed()

    def diff(self, level: int | None = None, row: int = 0) -> dict[str, Tensor]:
        """W − W_base of each weight that has changed: copies in the weight's layout, float32 or float64.

        Args:
            level: of this level alone; None for the sum over all.
            row: of the batch.
        """
        total: dict[str, Tensor] = {}
        for writer, state in zip(self._writers, self.row(row).levels, strict=True):
            for target in writer.targets if level in (None, writer.index) else ():
                delta = writer.full_delta(state, target)
                if delta is not None:
                    total[target.name] = total[target.name] + delta if target.name in total else delta.clone()
        return total

    # File ----------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Keep a memory file to oneself inside the scope, in which `save` and `load` use it freely.

        Raises:
            ValueError: another process, or another memory, has it in use.
        """
        with locked(path):
            self._held = Path(path).absolute()
            try:
                yield
            finally:
                self._held = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to one safetensors file, under a temporary name first.

        The file has the deltas, and what it takes to go on reading as if nothing had happened: the sums of
        unfinished chunks, the rules' states, the tokens of the present window, their keys and values. It
        has nothing of the base model but a fingerprint.

        Raises:
            ValueError: the file is in use by another process.
            OSError: it cannot be written; an earlier file is left as it was.
        """
        target = Path(path)
        tensors: dict[str, Tensor] = {}
        for index, row in enumerate(self.rows):
            tensors.update({f"{index}/{name}": t for name, t in _row_tensors(row).items()})
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "rows": to_json([_row_values(r) for r in self.rows]),
        }
        with self._locked(target):
            write_tensors(target, tensors, {**metadata, **self._identity()})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the memory of a file that `save` wrote; what this memory held is gone.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another format version, of another base model, or of a learner
                with other levels or another way of reading; the memory stays as it was.
        """
        source = Path(path)
        with self._locked(source):
            tensors, metadata = read_tensors(source, self._model.device)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{source} is a safetensors file, but not the memory of a learner")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{source} has memory format version {metadata.get('version')!r}, "
                f"this package reads {VERSION!r}"
            )
        for key, value in self._identity().items():
            if metadata.get(key) != value:
                raise ValueError(_mismatch(source, key, metadata.get(key), value))
        try:
            rows = json.loads(metadata["rows"])
            self.rows = [self._read_row(f"{i}/", values, tensors) for i, values in enumerate(rows)]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source} is damaged: {type(error).__name__}: {error}") from error

    def _locked(self, path: Path) -> Any:
        if self._held == path.absolute():
            return _unlocked()
        return locked(path)

    def _identity(self) -> dict[str, str]:
        """What a file must agree with to be loaded."""
        return {
            "fingerprint": fingerprint(self._model),
            "levels": to_json([writer.level.describe() for writer in self._writers]),
            "weights": to_json([[target.name for target in writer.targets] for writer in self._writers]),
            "reading": to_json(self._plan.describe()),
        }

    def _read_row(self, prefix: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> Row:
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        [row] = self._new_rows(1)
        row.position, row.start, row.tokens = values["position"], values["start"], own["tokens"]
        mask = own.get("mask")  # a file without one is of a time when everything was learned
        row.mask = torch.ones(len(row.tokens), dtype=torch.bool) if mask is None else mask.cpu()
        layers = values["context_layers"]
        row.context = Context(tuple((own[f"keys/{i}"], own[f"values/{i}"]) for i in range(layers)))
        row.context = row.context.to(self._model.dtype)
        for writer, state, numbers in zip(self._writers, row.levels, values["levels"], strict=True):
            state.loss, state.pairs = float(numbers["loss"]), numbers["pairs"]
            state.history = list(numbers["history"])
            for kind, slots in (("delta", state.deltas), ("sum", state.sums)):
                for slot in writer.keys:
                    if (stored := own.get(f"{writer.index}/{kind}/{slot}")) is not None:
                        slots[slot] = writer.checked(slot, stored)
            for field in numbers["rule"]:
                for slot in writer.keys:
                    if (stored := own.get(f"{writer.index}/rule/{field}/{slot}")) is not None:
                        state.rule.setdefault(slot, {})[field] = writer.as_memory(stored)
        return row


@contextmanager
def _unlocked() -> Iterator[None]:
    yield


def _row_tensors(row: Row) -> dict[str, Tensor]:
    tensors = {"tokens": row.tokens, "mask": row.mask}
    for i, (keys, values) in enumerate(row.context.layers):
        tensors[f"keys/{i}"], tensors[f"values/{i}"] = keys, values
    for index, state in enumerate(row.levels):
        tensors.update({f"{index}/delta/{slot}": t for slot, t in state.deltas.items()})
        tensors.update({f"{index}/sum/{slot}": t for slot, t in state.sums.items()})
        for slot, stored in state.rule.items():
            tensors.update({f"{index}/rule/{field}/{slot}": t for field, t in stored.items()})
    return tensors


def _row_values(row: Row) -> dict[str, Any]:
    return {
        "position": row.position,
        "start": row.start,
        "context_layers": len(row.context.layers),
        "levels": [
            {
                "loss": repr(state.loss),  # JSON has no NaN
                "pairs": state.pairs,
                "history": state.history,
                "rule": sorted({field for stored in state.rule.values() for field in stored}),
            }
            for state in row.levels
        ],
    }


def _mismatch(path: Path, key: str, theirs: str | None, ours: str) -> str:
    if key == "fingerprint":
        return (
            f"{path} belongs to another base model (fingerprint {str(theirs)[:12]}…, this one has "
            f"{ours[:12]}…): load it on the model that it was learned on"
        )
    return f"{path} was written by a learner with other {key}: {theirs}; this learner has {ours}"
