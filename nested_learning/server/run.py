"""The server's process: a port, signals, the end in order."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from nested_learning.server.app import make_app
from nested_learning.server.folder import check_root
from nested_learning.server.mind import Mind
from nested_learning.server.service import Service
from nested_learning.server.settings import ServeSettings

KEEP_ALIVE = 5


class LoopServer(uvicorn.Server):
    """uvicorn, which says when requests are taken, and tells the service as soon as it drains.

    Args:
        config: uvicorn's settings.
        service: the server.
        on_start: called with the address.
    """

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        await super().shutdown(sockets=sockets)


def make_server(
    mind: Mind, settings: ServeSettings, on_start: Callable[[str], None] = lambda address: None
) -> tuple[LoopServer, socket.socket]:
    """(server, bound socket); `server.run(sockets=[socket])` runs it until it is told to end.

    Args:
        mind: the model.
        settings: the server's settings.
        on_start: called with the address when requests are taken.

    Raises:
        ValueError: the file of keys is damaged.
        OSError: the port is in use, the keys cannot be read, or the folder of memories cannot be used.
    """
    service = Service(mind, settings)
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=65536,
    )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        message = (
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another "
            f"{'--host' if isinstance(error, socket.gaierror) else '--port'}"
        )
        raise OSError(error.errno, message) from error
    try:
        check_root(Path(settings.memories))
    except OSError:
        bound.close()
        raise
    return LoopServer(config, service, on_start), bound


def serve(mind: Mind, settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    if not settings.is_local and settings.keys is None:
        print(
            f"warning: {settings.host} can be reached from elsewhere, and there is no file of keys: every "
            "request will get a 401. Make one with --keys FILE --add_key USER.",
            file=sys.stderr,
        )
    server, bound = make_server(mind, settings, lambda address: print(f"serving on {address}", flush=True))
    server.run(sockets=[bound])
    return 0 if server.started else 1
