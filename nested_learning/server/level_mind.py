"""A pretrained model with levels of deltas, whose memory of a user is the levels' state."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nested_learning.continual import Learner, Snapshot, Write
from nested_learning.continual.averages import answering
from nested_learning.server.mind import FREE, Learned, Mind, MindLevel, numbers


class LevelMind(Mind):
    """A pretrained model with levels of deltas; a memory is a `Snapshot` of a learner of one row.

    `load` and `save` take the model's lock for a moment.

    Args:
        make_learner: makes a learner on the one base model, with the levels and the way of reading that all
            users have.
        kept_weights: bytes for ready-made weights of users; switching between more users sums them anew.
    """

    def __init__(self, make_learner: Callable[[], Learner], kept_weights: int = 0) -> None:
        self._make_learner = make_learner
        learner = make_learner()
        self.model = learner.model.eval()
        self.tokenizer = learner.tokenizer
        self._levels = learner.levels
        self.levels = tuple(
            MindLevel(f"level {index}", level.chunk_size, level.lr)
            for index, level in enumerate(learner.levels)
        )
        self._reader = learner.reader
        self.empty: Snapshot = learner.memory.snapshot()
        size = learner.info().effective_weights
        self.kept = max(1, kept_weights // size) if size else FREE
        self._reader.workspace.keep = self.kept

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
        counts = Counter(write.level for write in writes if write.outcome == "written")
        written = [counts[index] for index in range(len(self.levels))]
        return Learned(learner.memory.snapshot(), self.words(ids), numbers(surprise), written, writes)

    def score(self, memory: Snapshot, ids: list[int]) -> Generator[None, None, list[float | None]]:
        """Next-token losses of ids as a text of its own, as of `Learner.score`; nothing is learned."""
        row = memory.rows[0].only(answering(self._levels)).unread()
        given = torch.tensor(ids, device=self.model.device)
        learn = torch.zeros(len(ids), dtype=torch.bool)
        losses: list[float] = []
        for piece in self._pieces(0, len(ids)):
            losses += self._reader.score(row, given[piece], learn[piece]).tolist()
            row.start = len(row.tokens)
            yield
        return numbers(losses)

    def _pieces(self, position: int, count: int) -> Iterator[slice]:
        return (piece for piece, _ in self._reader.plan.pieces(position, count))

    # Answering -----------------------------------------------------------------------------------------

    def start(self, memory: Snapshot, prompt: list[int]) -> tuple[DynamicCache, list[int]]:
        """(an empty cache of keys and values, the prompt): the memory is in the weights."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)), prompt

    def branch(self, cache: DynamicCache) -> DynamicCache:
        """A copy of the keys and values."""
        return copy.deepcopy(cache)

    def read(self, memory: Snapshot, cache: DynamicCache, ids: Tensor, *, is_answer: bool) -> Tensor:
        """Logits [1, V] after ids [1, T], read under the memory's weights."""
        with self.running(memory) as model:
            logits: Tensor = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        return logits[:, -1]

    @contextmanager
    def running(self, memory: Snapshot) -> Iterator[Any]:
        """The model runs with a memory inside the scope, without gradients."""
        row = memory.rows[0].only(answering(self._levels))
        with torch.no_grad(), self._reader.workspace.installed(self._reader.writers, row):
            yield self.model

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
        return learner.memory.snapshot()

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
