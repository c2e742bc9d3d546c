"""Errors that bad input causes, and their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nested_learning._files import NO_ROOM

DEBUG = "NESTED_LEARNING_DEBUG"


def message_of(error: Exception) -> str:
    """The message for an error that ends a command.

    ValueError comes from this package's checks of its input, OSError from files, SafetensorError from a
    damaged file of weights. Whatever else comes up is told with its kind, and how to see where it was raised.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{NO_ROOM.get(error.errno or 0, error.strerror)}: {error.filename}"
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    if isinstance(error, MemoryError):
        return "this needs more memory than there is; take a smaller model, batch or text"
    if isinstance(error, RecursionError):
        return "a value is nested too deeply"
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        fault = "could not be written" if "while serializing" in str(error) else "is damaged"
        return f"the safetensors file {fault}: {error}"
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{told} (set {DEBUG}=1 to see where)"


def unknown_command(name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown command {name!r}.{hint} Known: {', '.join(known)}.")
