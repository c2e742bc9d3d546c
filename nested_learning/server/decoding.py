"""Text of an answer as it grows: whole characters only, and nothing that may be the start of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # how a decoder shows bytes that are no character, or not yet


class AnswerText:
    """Text of one answer, token by token. All that was handed out, joined, is the answer.

    Args:
        tokenizer: tokenizer of the model.
        stop: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens that the next ones are decoded with, and those decoded before
        self._text = ""
        self._given = 0  # characters of `text` that were handed out
        self.stopped = False

    @property
    def text(self) -> str:
        """The answer so far, what is held back included."""
        return self._text

    def add(self, token: int) -> str:
        """The text that can be handed out with one more token. `stopped` says whether a stop text came."""
        self._ids.append(token)
        before, now = self._decoded(self._start, self._read), self._decoded(self._start, len(self._ids))
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self._text += now[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        self._cut()
        return self._hand_out(len(self._text) - (0 if self.stopped else self._held()))

    def end(self) -> str:
        """The rest of the text, when no more tokens come."""
        if not self.stopped:
            whole = self._decoded(0, len(self._ids))
            if whole.startswith(self._text[: self._given]):
                self._text = whole
            self._cut()
        return self._hand_out(len(self._text))

    def _decoded(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _cut(self) -> None:
        found = [at for at in (self._text.find(text) for text in self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        return max((_overlap(self._text, text) for text in self._stop), default=0)

    def _hand_out(self, end: int) -> str:
        given, self._given = self._given, max(self._given, end)
        return self._text[given : self._given]


def _overlap(text: str, stop: str) -> int:
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if stop.startswith(text[-n:])), 0)
