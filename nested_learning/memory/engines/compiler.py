"""Functions of one chunk through torch.compile, each kind of arguments once; plainly without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

from nested_learning.ops.compiling import Compiled, Compiler

BACKEND: Compiler = "inductor"
# Numbers of rows for which one kind of arguments is compiled. Documents in a row come in any number, and a
# graph that takes any number is ten times as slow to trace.
ROWS = 4
_broken = False  # once compiling has failed
_rows: dict[Hashable, set[int]] = {}


def takes(kind: Hashable, rows: int) -> bool:
    """Whether there is a graph for so many rows, or one may be made: the first `ROWS` numbers of a kind.

    Args:
        kind: all else that the graph depends on.
    """
    known = _rows.setdefault(kind, set())
    if len(known) < ROWS and not _broken:
        known.add(rows)
    return rows in known and not _broken


def call(function: Callable[..., Any], kind: Hashable, *arguments: Any) -> Any:
    """function(*arguments) as a compiled graph, or plainly once compiling has failed, with one warning.

    Args:
        kind: all that the graph depends on, the number of rows too.
    """
    global _broken
    if _broken:
        return function(*arguments)
    compiled = _compiled(function, kind, BACKEND)
    out = compiled(*arguments)
    _broken = not compiled.works
    return out


@cache
def _compiled(function: Callable[..., Any], kind: Hashable, compiler: Compiler) -> Compiled:
    return Compiled(function, "the memory step", dynamic=False, backend=compiler)
