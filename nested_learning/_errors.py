"""Messages of errors that more than one storey raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: what came, the nearest one, all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


def kind_of(value: object) -> str:
    """The words for what came in the place of something else: the name of its class, or "the class …"."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
