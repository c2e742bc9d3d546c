"""Lines of the package: all, those of code, and whole-line comments.

    python -m tests.house.lines [FOLDER ...]    # of these folders of Python files, the package without any

Code is what is neither blank, nor a comment by itself, nor part of a docstring.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.house.imports import ROOT


def count(folder: Path) -> tuple[int, int, int]:
    """(all lines, lines of code, whole-line comments) of the Python files below a folder."""
    total = code = comments = 0
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        documented: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        for number, line in enumerate(text.splitlines(), 1):
            total += 1
            comments += line.lstrip().startswith("#")
            code += bool(line.strip()) and not line.lstrip().startswith("#") and number not in documented
    return total, code, comments


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:] or [str(ROOT)]):
        print(f"{folder}: {{}} lines, {{}} of code, {{}} comments".format(*count(folder)))
