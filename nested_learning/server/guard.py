"""The outermost layer of the application: names that it goes by, counts, what is told of faults."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nested_learning.server.refusal import Refusal
from nested_learning.server.service import Service

LOG = logging.getLogger("nested_learning.server")
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


class Guard:
    """Middleware. Without keys it lets no name in but this computer's: a page elsewhere can have its own name
    point at this computer, and its browser would take the server for a part of the page.

    Args:
        app: the application inside.
        service: the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        name = host_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        try:
            settings = self._service.settings
            host = settings.host.lower()
            if settings.trusts_user_field and name not in {*LOCAL_NAMES, host, f"[{host}]"}:
                refusal = Refusal(403, f"{name!r} is not a name of this computer", "host")
                await JSONResponse(refusal.body(), 403)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except Exception as error:
            # A message may quote what a user wrote: the log gets the kind and the place alone.
            LOG.error("%s failed: %s at %s", scope["path"], type(error).__name__, place_of(error))
            if not status:
                refusal = Refusal(500, f"the server failed ({type(error).__name__})", "server_failed")
                await JSONResponse(refusal.body(), 500)(scope, receive, counted)
        finally:
            route: Any = scope.get("route")
            path = getattr(route, "path", "other")
            self._service.metrics.requests.labels(path, str(status)).inc()


def host_name(header: str) -> str:
    """The name in a Host header, without the port; in small letters, as case means nothing in names."""
    header = header.lower()
    return header if header.endswith("]") or ":" not in header else header.rpartition(":")[0]


def place_of(error: BaseException) -> str:
    """File and line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
