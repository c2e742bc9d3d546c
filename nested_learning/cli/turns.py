"""The turns of a conversation in a terminal, each with the memory before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

M = TypeVar("M")  # a memory as a value


def check_room(max_new_tokens: int, positions: int) -> None:
    """ValueError where an answer may take all the positions of the model, so that no message fits."""
    if max_new_tokens >= positions:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but the model reads {positions} positions in all; "
            f"expected at most {positions - 1}, and less for longer messages"
        )


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
