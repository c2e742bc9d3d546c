"""Bodies of requests, read within a bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request

from nested_learning._checks import check_text
from nested_learning.server.refusal import Refusal, invalid


async def read_body(request: Request, most: int, take: Callable[[bytes], Any], kind: str) -> None:
    """Hand a body on, piece by piece.

    Args:
        request: the request.
        most: most bytes.
        take: called with each piece.
        kind: content type that is expected. A page of another origin cannot send one of these without asking
            first, which this server never allows: so no page can teach a memory behind its user's back.

    Raises:
        Refusal: another content type (415), or too many bytes (413).
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise Refusal(415, f"the content type is {given!r}, expected {kind!r}", "content_type")
    too_long = Refusal(413, f"the body is longer than {most:,} bytes", "body_too_long")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_long
    count = 0
    async for piece in request.stream():
        count += len(piece)
        if count > most:
            raise too_long
        take(piece)


async def read_json(request: Request, most: int) -> object:
    """The JSON value of a body.

    Raises:
        Refusal: as `read_body`, or it is no JSON, or has texts that are none (400).
    """
    pieces: list[bytes] = []
    await read_body(request, most, pieces.append, "application/json")
    try:
        value: object = json.loads(b"".join(pieces), parse_constant=_no_number)
        # JSON has escapes for halves of surrogate pairs, of which no tokenizer and no answer can be made
        check_text(json.dumps(value, ensure_ascii=False), "a text in it")
        return value
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is no JSON: {error}", None, "invalid_json") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
