"""Files and functions stay small enough to be seen whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.imports import ROOT, modules

LONGEST_FILE = 500
LONGEST_FUNCTION = 60


def functions() -> Iterator[tuple[int, str, str]]:
    """(lines, where, docstring) of every function and method, its signature and docstring included."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_docstring(node, clean=False) or ""
                assert node.end_lineno is not None
                yield (
                    node.end_lineno - node.lineno + 1,
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
                    text,
                )


def test_files():
    long = {
        str(path.relative_to(ROOT)): count
        for path in modules().values()
        if (count := path.read_text(encoding="utf-8").count("\n")) > LONGEST_FILE
    }
    assert not long


def test_functions():
    """A longer one says in its docstring why it is: "Long: …"."""
    long = [
        (lines, where)
        for lines, where, text in functions()
        if lines > LONGEST_FUNCTION and "Long: " not in text
    ]
    assert not long
