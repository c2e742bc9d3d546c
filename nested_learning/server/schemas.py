"""Requests as clients send them, checked: what would change the answer and is not there, is refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_learning.server.keys import LONGEST_USER
from nested_learning.server.refusal import invalid

# Fields that change nothing of an answer.
IRRELEVANT = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "user"} | {
    "prompt_cache_retention", "parallel_tool_calls",
}  # fmt: skip
# Values of fields that this server does not have with which they change nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "truncation": ("disabled",),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ClientRequest(BaseModel):
    """A body whose unknown fields are looked at by `unknown_fields`."""

    model_config = ConfigDict(extra="allow", strict=False)

    def unknown_fields(self, where: str = "") -> None:
        """Refuse fields that this server does not have, unless their value changes nothing."""
        for name, value in (self.model_extra or {}).items():
            is_neutral = value is None or value is False or value in ([], {}, "")
            if name in IRRELEVANT or is_neutral or value in NEUTRAL.get(name, ()):
                continue
            raise invalid(
                f"{where}{name} is not supported by this server; leave it out",
                f"{where}{name}",
                "unsupported_parameter",
            )


class EventOptions(ClientRequest):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers, which is never sent


class SampledRequest(ClientRequest):
    """The fields that chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: EventOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    user: str | None = Field(None, max_length=LONGEST_USER)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > 4 or not all(given):
            raise invalid("stop must be one to four texts that are not empty", "stop")
        return tuple(given)

    @property
    def longest(self) -> tuple[int | None, str]:
        """(most tokens of an answer, or None; the field that says so)."""
        return self.max_tokens, "max_tokens"

    @property
    def top(self) -> int | None:
        """Number of likeliest tokens to report; None for no log-probabilities."""
        raise NotImplementedError


class TextContent(ClientRequest):
    """A part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(ClientRequest):
    """A message."""

    role: str
    content: str | list[TextContent] | None = None

    def turn(self, where: str) -> tuple[str, str]:
        """(role, text); "developer" is "system"."""
        self.unknown_fields(f"{where}.")
        role = ROLES.get(self.role)
        if role is None:
            raise invalid(
                f"{where}.role is {self.role!r}, expected one of {', '.join(ROLES)}", f"{where}.role"
            )
        if self.content is None and role != "assistant":
            raise invalid(f"{where}.content is missing", f"{where}.content")
        if not isinstance(self.content, list):
            return role, self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                message = f"{where}.content has a part of type {part.type!r}; this server reads text alone"
                raise invalid(message, f"{where}.content", "unsupported_value")
        return role, "".join(part.text or "" for part in self.content)


class ChatRequest(SampledRequest):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each message; there is one that is not the system's."""
        turns = [message.turn(f"messages.{index}") for index, message in enumerate(self.messages)]
        if all(role == "system" for role, _ in turns):
            raise invalid("messages has no message of a user", "messages")
        return turns

    @property
    def longest(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def top(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SampledRequest):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20, strict=True)  # true and false are of chats alone

    @property
    def top(self) -> int | None:
        return self.logprobs


class MemoryRequest(ClientRequest):
    """A body of /v1/memories that names the user where the server trusts it to."""

    user: str | None = Field(None, max_length=LONGEST_USER)


class TextRequest(MemoryRequest):
    """A text to learn or to score."""

    text: str = Field(min_length=1)


class UndoRequest(MemoryRequest):
    """The number of conversations to take back."""

    conversations: int = Field(1, ge=1)


def parsed(kind: type[Any], values: object) -> Any:
    """The request of a JSON value.

    Raises:
        Refusal: a field is missing, of another type, out of range (400, which names it), or unknown.
    """
    if not isinstance(values, dict):
        raise invalid(f"the body must be a JSON object, got {type(values).__name__}", None)
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        raise invalid(f"{param}: {first['msg']}", param) from error
    request.unknown_fields()
    if isinstance(request, SampledRequest) and request.stream_options is not None:
        request.stream_options.unknown_fields("stream_options.")
        if not request.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")
    return request


def _is_branch(part: object) -> bool:
    """Whether a part of a place names a member of a union, `list[str]` or `str`, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int") or part in globals())
