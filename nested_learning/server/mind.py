"""A model and its way of remembering: memories are values, which learning takes and gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from nested_learning.continual import Write
from nested_learning.continual.inputs import most_positions

# A memory as its mind makes it. Nobody changes one: learning gives the next, so any thread may hold several.
MemoryValue: TypeAlias = Any
FREE = 2**31  # users between whom switching is free, where no number of them costs anything


@dataclass(frozen=True)
class MindLevel:
    """One of the speeds at which a memory is written.

    Attributes:
        name: name for people.
        chunk_size: tokens between two writes.
        lr: learning rate; None where the model makes its own.
    """

    name: str
    chunk_size: int
    lr: float | None = None


@dataclass(frozen=True)
class Learned:
    """The end of a lesson.

    Attributes:
        memory: the memory with the lesson.
        tokens: the tokens of the lesson as texts.
        surprise: next-token loss of each in nats; None for one that nothing comes before.
        written: number of writes of each level.
        writes: reports of the boundaries that were passed, where levels make some.
    """

    memory: MemoryValue
    tokens: list[str]
    surprise: list[float | None]
    written: list[int]
    writes: Sequence[Write] = ()


class Mind(ABC):
    """A model and its way of remembering.

    `learn`, `score`, `start`, `branch` and `read` are called on the scheduler's thread; `save` and `load` on
    others, at any time.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        levels: the speeds at which a memory is written, fast to slow.
        empty: the memory of nothing.
        kept: number of users between whom switching is free.
        grows: whether a memory becomes larger with each token.
    """

    model: Any
    tokenizer: Any
    levels: tuple[MindLevel, ...]
    empty: MemoryValue
    kept: int = FREE
    grows: bool = False

    # Text ----------------------------------------------------------------------------------------------

    @property
    def positions(self) -> int:
        """Most tokens of a prompt and its answer; `continual.inputs.UNBOUNDED` where there is no bound."""
        return most_positions(self.model)

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        given = self.model.generation_config.eos_token_id
        return frozenset(given if isinstance(given, list) else () if given is None else (given,))

    def encode(self, text: str) -> list[int]:
        """Ids of a text that goes on from another."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def lesson_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids to learn for texts: each stands on a line of its own."""
        return [token for text in texts for token in self.encode(f"{text}\n")]

    def words(self, ids: Sequence[int]) -> list[str]:
        """Text of each token by itself."""
        return [self.tokenizer.decode([token]) for token in ids]

    # Learning ------------------------------------------------------------------------------------------

    @abstractmethod
    def learn(self, memory: MemoryValue, ids: list[int]) -> Generator[None, None, Learned]:
        """Learn ids in turns of at most one chunk. The memory given stays as it is."""

    @abstractmethod
    def score(self, memory: MemoryValue, ids: list[int]) -> Generator[None, None, list[float | None]]:
        """Next-token losses in nats of ids as a text that is not learned; None where nothing comes before."""

    # Answering -----------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, memory: MemoryValue, prompt: list[int]) -> tuple[Any, list[int]]:
        """(a cache for an answer under a memory, ids that it is to read first, those of the prompt last)."""

    @abstractmethod
    def branch(self, cache: Any) -> Any:
        """A cache that goes its own way from where another one is."""

    @abstractmethod
    def read(self, memory: MemoryValue, cache: Any, ids: Tensor, *, is_answer: bool) -> Tensor:
        """Logits [1, V] after ids [1, T], which the cache takes in.

        Args:
            memory: memory of the user.
            cache: of `start` or `branch`, for this memory.
            ids: ids of the prompt, or of the answer.
            is_answer: which of the two.
        """

    # Files ---------------------------------------------------------------------------------------------

    @abstractmethod
    def save(self, memory: MemoryValue, path: Path) -> None:
        """Write a memory to a file. OSError where it cannot be written, ValueError where it is empty and
        an empty one has no file."""

    @abstractmethod
    def load(self, path: Path) -> MemoryValue:
        """The memory in a file. ValueError where it is damaged or another model's, FileNotFoundError."""

    @abstractmethod
    def nbytes(self, memory: MemoryValue) -> int:
        """Bytes of a memory."""

    @abstractmethod
    def tokens_read(self, memory: MemoryValue) -> int:
        """Number of tokens that a memory was made of."""


def numbers(losses: Iterable[float]) -> list[float | None]:
    """Losses as JSON has them: None for NaN and infinity."""
    return [loss if math.isfinite(loss) else None for loss in losses]
