"""The HTTP application: routes, errors in OpenAI's form, streams that let go of everything when they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from nested_learning.server.answers import Answering
from nested_learning.server.guard import Guard
from nested_learning.server.memory_routes import add_memory_routes, claimed, told
from nested_learning.server.refusal import Refusal
from nested_learning.server.service import Service

CLIENT_GONE = 499
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class HeldStream(StreamingResponse):
    """A stream of events. However it ends, before its first event too, it lets go of its answer's holds."""

    def __init__(self, answering: Answering) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answering.events(), media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answering.close()


def make_app(service: Service) -> FastAPI:
    """The application of a server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="nested-learning", openapi_url=None, lifespan=lifespan)
    add_errors(app)
    app.add_middleware(Guard, service=service)
    add_memory_routes(app, service)

    @app.get("/", response_model=None)
    async def page() -> HTMLResponse:
        text = (files("nested_learning.server") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        state = "ending" if service.draining else "ok"
        return JSONResponse({"status": state, "troubles": service.troubles}, 503 if service.draining else 200)

    @app.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        claimed(service, request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> dict[str, Any]:
        claimed(service, request)
        return {"object": "list", "data": [model_entry(service)]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(request: Request, name: str) -> dict[str, Any]:
        claimed(service, request)
        if name != service.settings.served_name:
            raise Refusal(404, f"there is no model {name!r} here", "model_not_found", param="model")
        return model_entry(service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        return await answer(service, request, is_chat=True)

    @app.post("/v1/completions", response_model=None)
    async def completion(request: Request) -> Response:
        return await answer(service, request, is_chat=False)

    return app


def model_entry(service: Service) -> dict[str, Any]:
    """The one model, as clients list models."""
    return {
        "id": service.settings.served_name,
        "object": "model",
        "created": 0,
        "owned_by": "nested-learning",
    }


async def answer(service: Service, request: Request, is_chat: bool) -> Response:
    """Answer a chat or a completion."""
    body = await told(service, request)
    named = body.get("user") if isinstance(body, dict) else None
    user = service.identify(request.headers.get("authorization"), named if isinstance(named, str) else None)
    answering = Answering(service, body, is_chat, user)
    try:
        await unless_gone(request, answering.begin())
        if answering.is_streamed:
            return HeldStream(answering)
        whole = await unless_gone(request, answering.whole())
    except BaseException:
        await answering.close()
        raise
    await answering.close()
    return JSONResponse(whole)


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of some work, which is cancelled when the client goes away. ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


def add_errors(app: FastAPI) -> None:
    """Have all errors told in OpenAI's form."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        refusal = Refusal(error.status_code, message, "not_found" if error.status_code == 404 else "http")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)
