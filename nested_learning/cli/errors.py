"""Errors that bad input causes, and their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nested_learning._files import NO_ROOM


def bad_input(error: Exception) -> str | None:
    """The message for an error that bad input causes, or None for an error of the program.

    ValueError comes from this package's checks of its input, OSError from files, SafetensorError from a
    damaged file of weights. Every other error keeps its traceback.
    """
    from safetensors import SafetensorError

    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{NO_ROOM.get(error.errno or 0, error.strerror)}: {error.filename}"
    if isinstance(error, SafetensorError):
        fault = "could not be written" if "while serializing" in str(error) else "is damaged"
        return f"the safetensors file {fault}: {error}"
    return str(error) if isinstance(error, (ValueError, OSError)) else None


def unknown_command(name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown command {name!r}.{hint} Known: {', '.join(known)}.")
