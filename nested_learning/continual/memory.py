"""The memory of a learner: the rows' deltas and all that goes with them, apart from the base model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nested_learning.continual.averages import answering
from nested_learning.continual.deltas import Row
from nested_learning.continual.files import (
    fingerprint,
    first_difference,
    locked,
    read_memory,
    to_json,
    write_memory,
)
from nested_learning.continual.inputs import checked_index
from nested_learning.continual.level import COUNT
from nested_learning.continual.objectives.anchors import NO_ANCHORS, Anchors
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.replaying.store import Store
from nested_learning.continual.starts.starts import Starts
from nested_learning.continual.weights import Workspace, acting
from nested_learning.continual.writing import DeltaWriter, relay
from nested_learning.memory.state import Weights


@dataclass(frozen=True)
class Snapshot:
    """The memory at one moment, for `Memory.restore`. It costs no memory until something is learned."""

    rows: list[Row]
    settings: Mapping[str, str]  # what a file of the memory would have to agree with, the model left out
    model: PreTrainedModel | None  # the base model
    keeps: bool  # whether the learner keeps text for replay

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}  # a file of a snapshot has no base model in it


class Memory:
    """Everything that was learned on top of a base model, per row of the batch.

    Args:
        model: the base model; its parameters are never changed.
        writers: one per level.
        plan: how text is read.
        anchors: what holds the levels to the base model.
        replay: how what was read is kept; None to keep nothing of it.

    Attributes:
        rows: rows.
        file_dtype: precision of the files that `save` writes, where it is not told: None or torch.bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        writers: Sequence[DeltaWriter],
        plan: ReadingPlan,
        anchors: Anchors = NO_ANCHORS,
        replay: Replay | None = None,
    ) -> None:
        self._model = model
        self._writers = writers
        self._plan = plan
        self._anchors = anchors
        self._replay = replay
        self._held: frozenset[Path] = frozenset()
        self.file_dtype: torch.dtype | None = None
        self.rows = self._new_rows(1)

    def __repr__(self) -> str:
        rows = ", ".join(f"{row.position:,} tokens" for row in self.rows)
        return f"Memory({len(self._writers)} levels; {rows}; {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of deltas, sums of unfinished chunks and states of the rules, of all rows."""
        tensors = (t for row in self.rows for state in row.levels for t in state.tensors())
        return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    @property
    def starts(self) -> Starts | None:
        """The learned rates and starts that rows begin with; None where levels begin at zero."""
        return self._anchors.starts

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read yet."""
        return all(row.position == 0 for row in self.rows)

    def set_rows(self, count: int) -> None:
        """Make room for `count` rows, before anything is read.

        Raises:
            ValueError: no whole number above 0, or the memory has another number of rows and has read
                something.
        """
        COUNT.check("rows", count)
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
        return [self.new_row() for _ in range(count)]

    def new_row(self) -> Row:
        """A row that has read nothing."""
        row = Row.new((writer.new_state() for writer in self._writers), self._model.device)
        row.store = None if self._replay is None else Store()
        return row

    def row(self, index: int) -> Row:
        """The row `index`. ValueError if there is no such row."""
        return self.rows[checked_index("row", index, len(self.rows))]

    # Undoing -------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The memory as it is now."""
        rows = [row.share() for row in self.rows]
        return Snapshot(rows, self._settings(), self._model, self._replay is not None)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, exactly. It can be restored any number of times.

        Raises:
            ValueError: it is none, or of a learner with other levels, another way of reading, another base
                model, or with replay where this one has none; the memory stays as it was.
        """
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"expected what `snapshot` returned, got {type(snapshot).__name__}")
        key = first_difference(snapshot.settings, own := self._settings())
        if key is not None:
            raise ValueError(
                "the snapshot is of a learner with other levels, another way of reading or other anchors: "
                f"its {key} is {snapshot.settings.get(key)}, here it is {own.get(key)}"
            )
        if snapshot.model not in (None, self._model) and _base(snapshot.model) != _base(self._model):
            raise ValueError("the snapshot is of a learner on another base model: restore it there")
        rows = [row.share() for row in snapshot.rows]
        self.rows = rows if snapshot.keeps and self._replay else self._with_stores(rows, "the snapshot")

    def _with_stores(self, rows: list[Row], what: str) -> list[Row]:
        """Rows of a learner that may keep text where this one does not, or the other way round."""
        if self._replay is None and any(row.store is not None for row in rows):
            raise ValueError(
                f"{what} keeps what was read for replay, which this learner does not: give "
                "stack_levels a replay=Replay(…), or chat a --replay. To have it deleted, load it so, call "
                "memory.drop_stores() and save it"
            )
        if self._replay is not None:
            for row in rows:
                row.store = Store.late(row.position) if row.store is None else row.store
        return rows

    def reset(self, level: int | None = None) -> None:
        """Forget everything, or the delta, the unfinished chunk's sums and the rule's state of one level.

        A level with learned starts goes back to its start. What an average took from a level stays with the
        average.

        Args:
            level: index of the level, 0 is the fastest; None for all, the place in the text included.

        Raises:
            ValueError: there is no such level.
        """
        if level is None:
            self.rows = self._new_rows(len(self.rows))
            return
        checked_index("level", level, len(self._writers))
        for row in self.rows:
            relay(self._writers, row, level)  # sums that the slower level has yet to add
            # averages of the level are products with its drawn factors
            drawn, row.levels[level] = row.levels[level].drawn, self._writers[level].new_state()
            row.levels[level].drawn = drawn
            row.store = row.store and row.store.incomplete("reset")
            row.mark_changed()

    def drop_stores(self) -> None:
        """Delete all that replay has kept of what was read, and keep nothing from now on, in no row, also
        not the names that `observe` is given.

        What was learned stays, and so do the tokens of the present window. A file that is saved then can be
        loaded by a learner without replay.
        """
        for row in self.rows:
            row.store = None

    def diff(self, level: int | None = None, row: int = 0) -> Weights:
        """W − W_base of each weight that has changed: copies in the weight's layout, float32 or float64.

        Args:
            level: index of the only level to count; None for the sum over all that answer, where averages
                stand in the place of what they average.
            row: index of the row.

        Raises:
            ValueError: there is no such level or row.
        """
        total: Weights = {}
        if level is None:
            chosen = answering([writer.level for writer in self._writers])
        else:
            chosen = (checked_index("level", level, len(self._writers)),)
        for writer, state, target in acting(self._writers, self.row(row).only(chosen)):
            delta = writer.full_delta(state, target)
            if delta is not None:
                total[target.name] = total[target.name] + delta if target.name in total else delta.clone()
        return total

    # File ----------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Keep a memory file to oneself inside the scope, in which `save` and `load` use it freely.

        Raises:
            ValueError: another process, or another memory, has it in use; it is a folder, a device or a pipe.
            OSError: its folder is missing, or it is write-protected.
        """
        with self._locked(path):
            held = self._held
            self._held = held | {Path(os.path.realpath(path))}
            try:
                yield
            finally:
                self._held = held

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the memory to one safetensors file, under a temporary name first.

        The file has the deltas, and what it takes to go on reading as if nothing had happened: the sums of
        unfinished chunks, the rules' states, the tokens of the present window, their keys and values. It
        has nothing of the base model but a fingerprint.

        Args:
            path: path of the file.
            dtype: torch.bfloat16 halves a file of float32: all deltas, sums, states of rules, keys and values
                are rounded to 8 bits, each by a share of 2⁻⁸ at most, and float32 again when they are
                loaded. None for `file_dtype`, and where that is None, too, exact.

        Raises:
            ValueError: the file is in use by another process, or is a folder, a device or a pipe; or another
                dtype.
            OSError: it cannot be written; an earlier file is left as it was.
        """
        with self._locked(path):
            write_memory(Path(path), self.rows, self._identity(), dtype or self.file_dtype)

    @torch.inference_mode(False)
    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the memory of a file that `save` wrote; what this memory held is gone.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another format version, of another base model, or of a learner
                with other levels or another way of reading; the memory stays as it was.

        Warns:
            RuntimeWarning: the file is of a version without checksums.
        """
        if not Path(path).is_file():  # before there is a lock beside it
            raise FileNotFoundError(f"no memory file at {os.fspath(path)}")
        with self._locked(path):
            rows = read_memory(Path(path), self._writers, self._model, self._plan, self._identity())
        self.rows = self._with_stores(rows, os.fspath(path))

    def _locked(self, path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        return nullcontext() if Path(os.path.realpath(path)) in self._held else locked(path)

    def _settings(self) -> dict[str, str]:
        """Settings of the levels, the names of the weights that each has, the way of reading, the anchors."""
        return {
            "levels": to_json([writer.level.describe() for writer in self._writers]),
            "weights": to_json([[target.name for target in writer.targets] for writer in self._writers]),
            "reading": to_json(self._plan.describe()),
            **self._anchors.identity(),
        }

    def _identity(self) -> dict[str, str]:
        """Everything that a file must agree with to be loaded."""
        return {"fingerprint": _base(self._model), **self._settings()}


def _base(model: Any) -> str:
    """Fingerprint of a base model, whatever deltas are in force."""
    with Workspace.of(model).bare():
        return fingerprint(model)
