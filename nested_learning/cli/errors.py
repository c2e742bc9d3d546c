"""Errors that bad input causes, and their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def bad_input(error: Exception) -> str | None:
    """The message for an error that bad input causes, or None for an error of the program.

    ValueError comes from this package's checks of its input, OSError from files, SafetensorError from a
    damaged file of weights. Every other error keeps its traceback.
    """
    from safetensors import SafetensorError

    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, SafetensorError):
        return f"the safetensors file is damaged: {error}"
    return str(error) if isinstance(error, (ValueError, OSError)) else None


def unknown_command(name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown command {name!r}.{hint} Known: {', '.join(known)}.")
