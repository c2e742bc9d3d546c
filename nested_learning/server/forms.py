"""Answers in OpenAI's forms: whole, and as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nested_learning.server.generation import AnswerPart
from nested_learning.server.sampling import TokenLogprob

DONE = b"data: [DONE]\n\n"


def event(values: object) -> bytes:
    """A value as one event of a stream."""
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    ) + b"\n\n"  # fmt: skip


@dataclass
class AnswerForm:
    """The answers to one request, collected, and written in the form of chats or of plain completions.

    Args:
        model: name of the model in the API.
        tokenizer: its tokenizer.
        is_chat: which of the two forms.
        with_logprobs: whether log-probabilities are wanted.
        with_usage: whether a stream ends with the counts.
    """

    model: str
    tokenizer: Any
    is_chat: bool
    with_logprobs: bool = False
    with_usage: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def add(self, part: AnswerPart) -> bytes:
        """Take in a part; the events of a stream for it, empty where there is nothing to show."""
        is_new = part.choice not in self.texts
        offset = len(self.texts.get(part.choice, ""))
        self.texts[part.choice] = self.texts.get(part.choice, "") + part.text
        self.logprobs.setdefault(part.choice, []).extend(part.tokens)
        self.answer_tokens += part.count
        if part.finish is not None:
            self.finishes[part.choice] = part.finish
        events = b""
        if is_new and self.is_chat:
            events = self._chunk(part.choice, {"role": "assistant", "content": ""})
        if part.text or part.tokens:
            content: Any = {"content": part.text} if self.is_chat else part.text
            events += self._chunk(part.choice, content, self._logprobs(part.tokens, offset))
        return events

    def ending(self) -> bytes:
        """The last events of a stream: why each answer ended, the counts, and the end itself."""
        events = b"".join(
            self._chunk(choice, {} if self.is_chat else "", finish=finish)
            for choice, finish in self.finishes.items()
        )
        if self.with_usage:
            events += event({**self._head(streamed=True), "choices": [], "usage": self._usage()})
        return events + DONE

    def whole(self) -> dict[str, Any]:
        """The answers as one JSON value."""
        choices = []
        for choice, text in sorted(self.texts.items()):
            content: dict[str, Any] = {"text": text}
            if self.is_chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {
                    "index": choice,
                    **content,
                    "logprobs": self._logprobs(self.logprobs[choice], 0),
                    "finish_reason": self.finishes[choice],
                }
            )
        return {**self._head(streamed=False), "choices": choices, "usage": self._usage()}

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
        }

    def _chunk(
        self, choice: int, content: Any, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        field_name = "delta" if self.is_chat else "text"
        shown = {"index": choice, field_name: content, "logprobs": logprobs, "finish_reason": finish}
        usage: dict[str, Any] = {"usage": None} if self.with_usage else {}
        return event({**self._head(streamed=True), "choices": [shown], **usage})

    # Log-probabilities ---------------------------------------------------------------------------------

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        if self.is_chat:
            content = [
                {
                    **self._shown(token.token, token.logprob),
                    "top_logprobs": [self._shown(*pair) for pair in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        words = [self._word(token.token) for token in tokens]
        offsets = [offset + sum(map(len, words[:index])) for index in range(len(words))]
        tops = [{self._word(other): value for other, value in token.top} for token in tokens]
        values = [token.logprob for token in tokens]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _shown(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        # a token may be a part of a character, whose bytes its text does not show
        data = None if "\ufffd" in word else list(word.encode("utf-8", "replace"))
        return {"token": word, "logprob": max(logprob, -9999.0), "bytes": data}
