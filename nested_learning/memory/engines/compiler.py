"""Functions of one chunk through torch.compile, each kind of arguments once; plainly without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch

Compiler = str | Callable[..., Any]
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
    try:
        return _compiled(function, kind, BACKEND)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        out = function(*arguments)  # raises again what is not the compiler's
        _broken = True
        warnings.warn(
            f"torch.compile of the memory step failed; it runs without from now on: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return out


@cache
def _compiled(function: Callable[..., Any], kind: Hashable, compiler: Compiler) -> Callable[..., Any]:
    assert isinstance(function, FunctionType)
    # torch counts compilations by code object, and after eight runs it plainly: each kind has its own object.
    code = function.__code__.replace(co_name=f"{function.__name__}_{_compiled.cache_info().misses}")
    own = FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=False, backend=compiler)
