"""`/v1/memories`: what a user can see of the memory, and do with it."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from nested_learning._files import MIB
from nested_learning.server.body import read_body, read_json
from nested_learning.server.journal import Entry
from nested_learning.server.keys import LONGEST_USER
from nested_learning.server.mind import Learned
from nested_learning.server.refusal import Refusal, invalid
from nested_learning.server.schemas import MemoryRequest, TextRequest, UndoRequest, parsed
from nested_learning.server.service import Service
from nested_learning.server.user import UserMemory, unwritten

Answer = dict[str, Any]


def add_memory_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""

    def with_body(
        kind: type[MemoryRequest], act: Callable[[Service, UserMemory, Any], Awaitable[Answer]]
    ) -> Callable[[Request], Awaitable[Answer]]:
        async def route(request: Request) -> Answer:
            values = parsed(kind, await told(service, request))
            name = service.identify(request.headers.get("authorization"), values.user)
            with service.admitted(name):
                async with service.memories.using(name) as user:
                    return await act(service, user, values)

        return route

    app.post("/v1/memories/learn", response_model=None)(with_body(TextRequest, learn))
    app.post("/v1/memories/score", response_model=None)(with_body(TextRequest, score))
    app.post("/v1/memories/undo", response_model=None)(with_body(UndoRequest, undo))

    @app.get("/v1/memories", response_model=None)
    async def show(request: Request) -> Answer:
        name = claimed(service, request)
        with service.admitted(name):
            async with service.memories.using(name) as user:
                return description(service, user)

    @app.post("/v1/memories/reset", response_model=None)
    async def reset(request: Request) -> Answer:
        values = parsed(MemoryRequest, await told(service, request))
        await service.memories.erase(service.identify(request.headers.get("authorization"), values.user))
        return {"object": "memory.reset", "reset": True}

    @app.delete("/v1/memories", response_model=None)
    async def delete(request: Request) -> Answer:
        await service.memories.erase(claimed(service, request))
        return {"object": "memory.deleted", "deleted": True}

    add_file_routes(app, service)


class HeldFile(FileResponse):
    """A memory on its way out. However it ends, its file goes, and its user may be put away again.

    Args:
        path: path of the file.
        held: closed at the end.
    """

    def __init__(self, path: Path, held: AsyncExitStack) -> None:
        super().__init__(path, filename="memory.safetensors")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


def add_file_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of memory files to an application."""

    @app.get("/v1/memories/export", response_model=None)
    async def export(request: Request) -> FileResponse:
        name = claimed(service, request)
        async with AsyncExitStack() as held:
            held.enter_context(service.admitted(name))
            user = await held.enter_async_context(service.memories.using(name))
            path = await user.export()
            held.callback(path.unlink, missing_ok=True)
            return HeldFile(path, held.pop_all())

    @app.post("/v1/memories/import", response_model=None)
    async def take_over(request: Request) -> Answer:
        name = claimed(service, request)
        with service.admitted(name):
            async with service.memories.using(name) as user:
                path: Path = user.folder.transfer_file()
                try:
                    with open(path, "xb") as file:
                        await read_body(
                            request, service.settings.memory_mb * MIB, file.write, "application/octet-stream"
                        )
                    await user.take_over(path, service.check_memory)
                except OSError as error:
                    raise unwritten(error) from error
                finally:
                    path.unlink(missing_ok=True)
                return description(service, user)


async def told(service: Service, request: Request) -> object:
    """The JSON body of a request whose key, where one is needed, is known before anything is read."""
    service.identify(request.headers.get("authorization"), None)
    return await read_json(request, service.settings.most_body_kb * 1024)


def claimed(service: Service, request: Request) -> str:
    """The user of a request without a body, who may be named in its address.

    Raises:
        Refusal: as `Service.identify`, or the name is longer than one in a body may be (400).
    """
    named = request.query_params.get("user")
    if named is not None and len(named) > LONGEST_USER:
        raise invalid(f"user: String should have at most {LONGEST_USER} characters", "user")
    return service.identify(request.headers.get("authorization"), named)


async def learn(service: Service, user: UserMemory, values: TextRequest) -> Answer:
    """Learn a text; it can be undone like a conversation."""
    tokens = len(await asyncio.to_thread(service.mind.lesson_ids, [values.text]))
    check_length(service, tokens)
    service.check_lesson(user, tokens)
    service.metrics.told_tokens.inc(tokens)
    name = f"text {secrets.token_hex(8)}"
    learned = await user.remember(lambda number: Entry(number, name, (values.text,)))
    await user.caught_up()
    lesson = await learned
    if lesson is None:
        message = "the text could not be learned, or the memory was deleted meanwhile"
        raise Refusal(503, message, "not_learned", retry_after=5)
    return {"object": "memory.lesson", **report(lesson)}


async def score(service: Service, user: UserMemory, values: TextRequest) -> Answer:
    """Next-token losses of a text; nothing is learned."""
    ids = await asyncio.to_thread(service.mind.encode, values.text)
    check_length(service, len(ids))
    await user.caught_up()
    surprise = await service.score(user, ids)
    return {"object": "memory.score", **surprises(service.mind.words(ids), surprise)}


async def undo(service: Service, user: UserMemory, values: UndoRequest) -> Answer:
    """Take back the last conversations, newest first."""
    await user.undo(values.conversations)
    return description(service, user)


def check_length(service: Service, tokens: int) -> None:
    """Refuse a text of no tokens (400) or of too many (413)."""
    most = service.settings.most_lesson_tokens
    if not tokens:
        raise Refusal(400, "the text has no tokens", "invalid_value", param="text")
    if tokens > most:
        raise Refusal(
            413, f"the text has {tokens} tokens, at most {most} at once", "text_too_long", param="text"
        )


def description(service: Service, user: UserMemory) -> Answer:
    """Everything that a user can know of the memory."""
    state = user.state
    levels = [
        {"name": level.name, "chunk_size": level.chunk_size, "lr": level.lr, "writes": writes}
        for level, writes in zip(service.mind.levels, state.writes, strict=True)
    ]
    return {
        "object": "memory",
        "bytes": service.mind.nbytes(user.memory),
        "tokens": service.mind.tokens_read(user.memory),
        "pending_tokens": user.pending_tokens,
        "levels": levels,
        "conversations_to_undo": len(user.past),
        "lessons_failed": state.failed,
        "changed": int(state.changed) or None,
        "now": int(time.time()),
        "trouble": user.trouble,
        "last_lesson": None if user.last is None else report(user.last),
    }


def report(lesson: Learned) -> Answer:
    """A lesson's surprise per token and its writes."""
    writes = [
        {
            "level": write.level,
            "position": write.position,
            "outcome": write.outcome,
            "loss": write.loss if math.isfinite(write.loss) else None,
        }
        for write in lesson.writes
    ]
    return {**surprises(lesson.tokens, lesson.surprise), "written": lesson.written, "writes": writes}


def surprises(words: list[str], losses: list[float | None]) -> Answer:
    """Tokens with their losses in nats, and the mean of those that have one."""
    known = [loss for loss in losses if loss is not None]
    tokens = [{"token": word, "surprise": loss} for word, loss in zip(words, losses, strict=True)]
    return {"tokens": tokens, "mean_surprise": sum(known) / len(known) if known else None}
