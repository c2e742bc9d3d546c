"""A conversation with a Hope model in a terminal: the mind of the server, for one user."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nested_learning._files import writable
from nested_learning.cli.turns import SpokenTurn, SpokenTurns, check_room
from nested_learning.continual.files import locked
from nested_learning.models.hope.session_hope import HopeSession
from nested_learning.server.generation import AnswerPart, Generation
from nested_learning.server.hope_mind import HopeMind
from nested_learning.server.prompt import fitting_ids, turn_ends
from nested_learning.server.sampling import Sampling, spread

POSITIONS = 8192  # most tokens of a prompt and its answer: older turns remain in the memory alone
NOTHING_KEPT = "a Hope model reads and keeps no texts, so there are no sources to list, to name or to forget"
T = TypeVar("T")


@dataclass
class HopeDialogue:
    """Answers messages and reads them after; the commands of a `Dialogue`.

    Args:
        mind: the model.
        max_new_tokens, temperature, top_p, seed: how answers are drawn.
        learn_from_replies: read the answers as well.

    Attributes:
        memory: the text that was read.

    Raises:
        ValueError: an answer may take all the positions of a prompt and its answer.
    """

    mind: HopeMind
    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    learn_from_replies: bool = False
    _turns: SpokenTurns[HopeSession] = field(default_factory=SpokenTurns)
    _files: set[Path] = field(default_factory=set)  # those that were loaded or written

    def __post_init__(self) -> None:
        check_room(self.max_new_tokens, POSITIONS)
        self.memory: HopeSession = self.mind.empty

    def reply(self, message: str) -> str:
        """The answer to a message, which is read then. ValueError where the message is too long."""
        turns = [pair for turn in self._turns for pair in (("user", turn.message), ("assistant", turn.reply))]
        tokenizer = self.mind.tokenizer
        prompt = fitting_ids(tokenizer, [*turns, ("user", message)], POSITIONS, self.max_new_tokens)
        sampling = Sampling(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=spread(f"{self.seed}/{self.memory.length}/{prompt}"),
            stop=turn_ends(tokenizer),
        )
        parts: list[AnswerPart] = []
        _result(Generation(self.mind, self.memory, prompt, sampling, parts.append).turns())
        reply = "".join(part.text for part in parts).strip()
        # Nothing is put in force before all of it is read, so an interruption leaves no trace.
        learned = _result(self.mind.learn(self.memory, self.mind.lesson_ids([message])))
        memory: HopeSession = learned.memory
        if self.learn_from_replies and reply:
            memory = _result(self.mind.learn(memory, self.mind.lesson_ids([reply]))).memory
        nats = [float("nan") if loss is None else loss for loss in learned.surprise]
        surprise = list(zip(learned.tokens, nats, strict=True))
        self._turns.append(SpokenTurn(self.memory, message, reply, surprise))
        self.memory = memory
        return reply

    def surprise(self) -> list[tuple[str, float]]:
        """(token, next-token loss in nats) of the last message. ValueError if there is none."""
        return self._turns.last().surprise

    def undo(self) -> str:
        """Take back the last message, its answer and what was read of them; returns the message."""
        turn = self._turns.last()
        self.memory = turn.before
        self._turns.pop()
        return turn.message

    def reset(self) -> None:
        """Forget the memory and the conversation."""
        self.memory = self.mind.empty
        self._turns.clear()

    def sources(self) -> Any:
        """ValueError: nothing is kept by name."""
        raise ValueError(NOTHING_KEPT)

    def forget(self, source: str) -> str:
        """ValueError: nothing is kept by name."""
        raise ValueError(NOTHING_KEPT)

    def name_source(self, source: str) -> None:
        """ValueError: nothing is kept by name."""
        raise ValueError(NOTHING_KEPT)

    # The file of the memory ----------------------------------------------------------------------------

    @property
    def tokens_read(self) -> int:
        """Number of tokens that the memory was made of."""
        return self.mind.tokens_read(self.memory)

    def lock(self, path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """As `Memory.lock`."""
        return locked(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the memory in a file. ValueError and FileNotFoundError as `HopeMind.load`."""
        self.memory = self.mind.load(Path(path))
        self._files.add(writable(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a file; an empty one is the absence of a file, and removes one of its own.

        Raises:
            ValueError: the path is that of a folder, a device or a pipe; or the memory is empty, and the file
                was neither loaded nor written by this conversation.
            OSError: it cannot be written or removed.
        """
        target = writable(path)
        if self.memory.cache.tokens_seen is not None:
            self.mind.save(self.memory, Path(path))
            self._files.add(target)
        elif target in self._files:
            target.unlink(missing_ok=True)
        elif target.exists():
            raise ValueError(
                f"the memory is empty, which is the absence of a file, but there is {path}, which is not of "
                "this conversation and stays as it is; name another file, or remove it yourself"
            )


def _result(turns: Generator[None, None, T]) -> T:
    """The end of a job that is nobody else's turn."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            result: T = end.value
            return result
