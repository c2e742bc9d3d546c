"""Imports point downward only, and no two modules import each other."""

from __future__ import annotations

import pytest

from tests.house.imports import NAME, circles, graph, modules

# Storeys from the ground up; a module may import its own storey and those below it. `optimizers` stand on
# `ops` alone: they are used by layers (rules of CMS levels), by training, and by `continual`.
STOREYS = (
    (
        "_version",
        "_errors",
        "_files",
        "_tensor_files",
        "_moved",
        "_precision",
        "_saved_models",
        "_workers",
        "_checks",
        "_lazy",
        "_progress",
        "_auto_classes",
    ),
    ("ops", "parts"),
    ("memory", "optimizers"),
    ("layers",),
    ("models",),
    ("continual",),
    ("levels",),
    ("training",),
    ("evals", "lens"),
    ("server",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {room: height for height, rooms in enumerate(STOREYS) for room in rooms}


def room(module: str) -> str:
    """The folder or file right below the package that a module belongs to."""
    return module.split(".")[1]


@pytest.fixture(scope="module")
def edges():
    return graph(modules())


def test_no_circles(edges):
    found = circles(edges)
    assert not found, "modules that import each other:\n" + "\n".join(" <-> ".join(c) for c in found)


def test_the_checker_finds_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_every_room_has_a_storey(edges):
    rooms = {room(module) for module in edges if module != NAME}
    assert rooms <= HEIGHT.keys(), f"give a storey to {sorted(rooms - HEIGHT.keys())}"


def test_imports_point_downward(edges):
    wrong = [
        f"{module} imports {other}"
        for module, others in sorted(edges.items())
        for other in sorted(others)
        # the package itself hands out public names; examples and the command line may take them from there
        if NAME not in (module, other) and HEIGHT[room(other)] > HEIGHT[room(module)]
    ]
    assert not wrong, "imports that point upward:\n" + "\n".join(wrong)


def test_rooms_of_one_storey_do_not_know_each_other(edges):
    wrong = [
        f"{module} imports {other}"
        for module, others in sorted(edges.items())
        for other in sorted(others)
        if NAME not in (module, other)
        and room(module) != room(other)
        and HEIGHT[room(module)] == HEIGHT[room(other)] > 0
    ]
    assert not wrong, "imports between rooms of one storey:\n" + "\n".join(wrong)
