"""A base model and its way of remembering: memories are values, which learning takes and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from nested_learning.continual import Learner, Snapshot, Write
from nested_learning.continual.averages import answering
from nested_learning.continual.inputs import most_positions


@dataclass(frozen=True)
class Learned:
    """The end of a lesson.

    Attributes:
        memory: the memory with the lesson.
        tokens: the tokens of the lesson as texts.
        surprise: next-token loss of each in nats; None for one that nothing comes before.
        writes: reports of the boundaries that were passed.
    """

    memory: Snapshot
    tokens: list[str]
    surprise: list[float | None]
    writes: list[Write]


class LevelMind:
    """A pretrained model with levels of deltas; a memory is a `Snapshot` of a learner of one row.

    `learn`, `score` and `running` run the model: the scheduler's thread calls them, and `load` for a moment.

    Args:
        make_learner: makes a learner on the one base model, with the levels and the way of reading that all
            users have.
        kept_weights: bytes for ready-made weights of users.

    Attributes:
        model: the base model, in evaluation mode.
        tokenizer: its tokenizer.
        levels: the levels, fast to slow.
        kept: number of users whose weights are kept ready; switching between more users sums them anew.
    """

    def __init__(self, make_learner: Callable[[], Learner], kept_weights: int = 0) -> None:
        self._make_learner = make_learner
        learner = make_learner()
        self.model = learner.model.eval()
        self.tokenizer = learner.tokenizer
        self.levels = learner.levels
        self._reader = learner.reader
        self.empty: Snapshot = self._complete(learner.memory.snapshot())
        size = learner.info().effective_weights
        self.kept = max(1, kept_weights // size) if size else 2**31
        self._reader.workspace.keep = self.kept

    @property
    def positions(self) -> int:
        """Most tokens of a prompt and its answer."""
        return most_positions(self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that goes on from another."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def lesson_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids to learn for texts: each stands on a line of its own."""
        return [token for text in texts for token in self.encode(f"{text}\n")]

    def words(self, ids: list[int]) -> list[str]:
        """Text of each token by itself."""
        return [self.tokenizer.decode([token]) for token in ids]

    # Learning ------------------------------------------------------------------------------------------

    def learn(self, memory: Snapshot, ids: list[int]) -> Generator[None, None, Learned]:
        """Learn ids in turns of at most one chunk of the fastest level. The memory given stays as it is."""
        learner = self._make_learner()
        learner.memory.restore(memory)
        surprise: list[float] = []
        writes: list[Write] = []
        for piece in self._pieces(learner.memory.rows[0].position, len(ids)):
            surprise += learner.observe(torch.tensor(ids[piece])).tolist()
            writes += learner.writes
            yield
        return Learned(learner.memory.snapshot(), self.words(ids), _numbers(surprise), writes)

    def score(self, memory: Snapshot, ids: list[int]) -> Generator[None, None, list[float | None]]:
        """Next-token losses of ids as a text of its own, as of `Learner.score`; nothing is learned."""
        row = memory.rows[0].only(answering(self.levels)).unread()
        given = torch.tensor(ids, device=self.model.device)
        learn = torch.zeros(len(ids), dtype=torch.bool)
        losses: list[float] = []
        for piece in self._pieces(0, len(ids)):
            losses += self._reader.score(row, given[piece], learn[piece]).tolist()
            row.start = len(row.tokens)
            yield
        return _numbers(losses)

    def _pieces(self, position: int, count: int) -> Iterator[slice]:
        return (piece for piece, _ in self._reader.plan.pieces(position, count))

    # Answering -----------------------------------------------------------------------------------------

    @contextmanager
    def running(self, memory: Snapshot) -> Iterator[Any]:
        """The model runs with a memory inside the scope, without gradients."""
        row = memory.rows[0].only(answering(self.levels))
        with torch.no_grad(), self._reader.workspace.installed(self._reader.writers, row):
            yield self.model

    def new_cache(self) -> DynamicCache:
        """The keys and values of an answer that is to come."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    # Files ---------------------------------------------------------------------------------------------

    def save(self, memory: Snapshot, path: Path) -> None:
        """Write a memory to a file that `Learner.memory` reads. ValueError and OSError as `Memory.save`."""
        learner = self._make_learner()
        learner.memory.restore(memory)
        try:
            learner.memory.save(path)
        finally:
            _lock_file(path).unlink(missing_ok=True)

    def load(self, path: Path) -> Snapshot:
        """The memory in a file. ValueError and FileNotFoundError as `Memory.load`."""
        learner = self._make_learner()
        try:
            learner.memory.load(path)
        finally:
            _lock_file(path).unlink(missing_ok=True)
        if len(learner.memory.rows) != 1:
            raise ValueError(f"{path} holds {len(learner.memory.rows)} rows, expected the memory of one user")
        return self._complete(learner.memory.snapshot())

    def _complete(self, memory: Snapshot) -> Snapshot:
        """The memory with the factors of low-rank levels that were never written, which come into being when
        a memory is first put into force: other threads may be reading it by then."""
        with torch.no_grad(), self._reader.workspace.installed(self._reader.writers, memory.rows[0]):
            return memory

    def nbytes(self, memory: Snapshot) -> int:
        """Bytes of a memory."""
        tensors = {id(t): t for row in memory.rows for level in row.levels for t in level.tensors()}
        contexts = sum(row.context.nbytes for row in memory.rows)
        return contexts + sum(t.numel() * t.element_size() for t in tensors.values())

    def tokens_read(self, memory: Snapshot) -> int:
        """Number of tokens that a memory was made of."""
        return memory.rows[0].position


def _lock_file(path: Path) -> Path:
    """The lock beside a file that only this process uses: the folder has one that counts."""
    return Path(f"{path}.lock")


def _numbers(losses: list[float]) -> list[float | None]:
    """Losses as JSON has them: None for NaN and infinity."""
    return [loss if math.isfinite(loss) else None for loss in losses]
