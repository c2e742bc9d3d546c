"""The clients of `benchmarks.serve`, in a process of their own, as they are in life.

python benchmarks/serve_load.py ADDRESS CLIENTS TOKENS tell|ask

Every client is a user. With `tell`, all have a text learned; with `ask`, all ask for an answer at once.
Prints JSON. Nothing but the standard library is imported, so that it starts at once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.client import HTTPConnection, HTTPResponse
from statistics import median
from typing import Any

TEXT = "The lighthouse of Varnholm was built in 1871 by two brothers who had never seen the sea. "


class Client:
    """A user who asks for plain completions, which are never learned, again and again.

    Args:
        address: address of the server.
        user: name of the user.
        tokens: tokens of an answer.
    """

    def __init__(self, address: str, user: str, tokens: int) -> None:
        self._address, self._user, self._tokens = address.removeprefix("http://"), user, tokens

    def tell(self) -> None:
        """Have the user's memory written to, so that weights differ from those of others."""
        body = {"text": f"{self._user}: {TEXT * 3}"}
        self._post("/v1/memories/learn", body).read()

    def _post(self, path: str, body: dict[str, Any]) -> HTTPResponse:
        headers = {"content-type": "application/json"}
        connection = HTTPConnection(self._address, timeout=600)
        connection.request("POST", path, json.dumps({**body, "user": self._user}), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {response.read().decode()}")
        return response

    def ask(self) -> tuple[float, float, int]:
        """(seconds to the first token, seconds in all, tokens) of one answer."""
        body = {
            "model": "model",
            "prompt": TEXT,
            "max_tokens": self._tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begun, first, tokens = time.perf_counter(), 0.0, 0
        for line in self._post("/v1/completions", body):
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begun
                usage = json.loads(line.removeprefix(b"data: "))["usage"]
                tokens = usage["completion_tokens"] if usage else tokens
        return first, time.perf_counter() - begun, tokens


def at_once(clients: list[Client]) -> dict[str, float]:
    """Median seconds to the first token, and tokens per second of all together, of an answer to each."""
    found: list[tuple[float, float, int]] = []
    threads = [
        threading.Thread(target=lambda client=client: found.append(client.ask())) for client in clients
    ]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(found) != len(clients):
        raise RuntimeError("a client has got no answer")
    return {
        "first": median(first for first, _, _ in found),
        "rate": sum(tokens for _, _, tokens in found) / seconds,
    }


def main(address: str, count: str, tokens: str, what: str) -> None:
    clients = [Client(address, f"user {n}", int(tokens)) for n in range(int(count))]
    if what == "ask":
        print(json.dumps(at_once(clients)))
        return
    for client in clients:
        client.tell()
    print("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
