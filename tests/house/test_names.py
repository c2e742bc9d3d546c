"""One name for a thing: class names over all modules, and docstrings that name what they describe."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.house.imports import ROOT, modules

# Names of classes and types that two modules define, each with the reason.
SHARED: dict[str, str] = {}
# Openings that leave out the noun: "Of the weights." for "Standard deviation of the weights."
NO_NOUN = re.compile(r"(Of|What|Those|That of|The same)\b")


def classes(path: Path) -> set[str]:
    """Names of all classes and type aliases (CamelCase names set at the top) that a module defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    set_at_top = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and re.match(r"_?[A-Z][a-z]", target.id)
    }
    return set_at_top | {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a module and of the classes, functions and methods in it that are public."""

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[int, str]]:
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text
        if isinstance(node, ast.FunctionDef):  # functions inside of functions are nobody's to call
            return
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and not inner.name.startswith("_"):
                yield from visit(inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def test_a_class_name_is_defined_once():
    where = defaultdict(list)
    for module, path in modules().items():
        for name in classes(path):
            where[name].append(module)
    twice = {name: sorted(found) for name, found in where.items() if len(found) > 1}
    offenders = [f"{name}: {', '.join(twice[name])}" for name in sorted(twice.keys() - SHARED.keys())]
    assert not offenders, "classes that bear one name, rename one of each:\n" + "\n".join(offenders)
    stale = sorted(SHARED.keys() - twice.keys())
    assert not stale, f"defined once by now, take them out of SHARED: {', '.join(stale)}"


def test_docstrings_name_the_noun():
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in modules().values()
        for line, text in docstrings(path)
        if NO_NOUN.match(text)
    ]
    assert not offenders, (
        f"{len(offenders)} docstrings open without their noun ('Standard deviation of the weights.', not "
        "'Of the weights.'):\n" + "\n".join(offenders)
    )
