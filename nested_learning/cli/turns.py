"""The turns of a conversation in a terminal, each with the memory before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

M = TypeVar("M")  # a memory as a value


@dataclass(frozen=True)
class SpokenTurn(Generic[M]):
    """A message and its answer, and the memory before them.

    Attributes:
        surprise: (token, next-token loss in nats) of the message.
    """

    before: M
    message: str
    reply: str
    surprise: list[tuple[str, float]]


class SpokenTurns(list[SpokenTurn[M]]):
    """Turns in their order."""

    def last(self) -> SpokenTurn[M]:
        """The newest turn. ValueError if there is none."""
        if not self:
            raise ValueError("nothing has been said yet in this conversation")
        return self[-1]
