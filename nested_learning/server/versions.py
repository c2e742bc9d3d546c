"""Versions of a user's memory, lessons on their way into it, and what can be gone back to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nested_learning.server.journal import Entry
from nested_learning.server.mind import Learned, MemoryValue, Mind

MOST_UNSAVED = 2  # versions to go back to that wait for a disk that is full


@dataclass
class MemoryVersion:
    """A memory, and where it is: in a file, here, or both; an empty one needs no file.

    Attributes:
        number: number of the journal's entry that it was made by.
        memory: the memory; None where it is in the file alone.
        file: name of the file; None before it was written.
        is_empty: whether nothing was learned.
    """

    number: int
    memory: MemoryValue | None
    file: str | None = None
    is_empty: bool = False
    _size: int | None = None

    def nbytes(self, mind: Mind) -> int:
        """Bytes of it here."""
        if self.memory is None:
            return 0
        if self._size is None:
            self._size = mind.nbytes(self.memory)
        return self._size

    @property
    def is_unsaved(self) -> bool:
        return self.file is None and not self.is_empty


@dataclass(frozen=True)
class PendingLesson:
    """A lesson that is in the journal and not learned yet.

    Attributes:
        entry: the journal's entry.
        ids: ids to learn.
        learned: set when it is learned; None where that failed or the user was deleted.
    """

    entry: Entry
    ids: list[int]
    learned: asyncio.Future[Learned | None]


Past = tuple[tuple[str, MemoryVersion], ...]


def begun(past: Past, conversation: str, current: MemoryVersion, most: int) -> Past:
    """The past once a conversation begins, or goes on.

    Args:
        past: conversations that can be taken back, oldest first, each with the memory before it.
        conversation: the conversation, which is the last one if it goes on.
        current: the memory as it is now.
        most: number of conversations that can be taken back.
    """
    if past and past[-1][0] == conversation:
        return past
    past = (*past, (conversation, current))
    unsaved = [at for at, (_, before) in enumerate(past) if before.is_unsaved]
    first = unsaved[-MOST_UNSAVED - 1] + 1 if len(unsaved) > MOST_UNSAVED else 0
    return past[max(first, len(past) - most) :]
