"""A nested system on a terminal: a table of numbers, and a tree of who learns what, how and from whom."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from nested_learning.levels.components import Component, DescribedLevel, Transfer
from nested_learning.levels.render.labels import End, ends, state_label

COLUMNS = ("level", "component", "part", "modules", "updated", "parameters", "state")
LEFT = ("component", "part", "updated")
WIDTH = 126  # of text that is not for a terminal


def table(title: str, levels: Sequence[DescribedLevel]) -> Table:
    """Levels and components with their numbers."""
    drawn = Table(title=title, title_justify="left")
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column in LEFT else "right")
    for level in levels:
        if level is not levels[0]:
            drawn.add_section()
        for place, component in enumerate(level.components):
            cells = ("" if place else str(level.number), *_cells(component))
            drawn.add_row(*map(Text, cells))
    return drawn


def _cells(component: Component) -> tuple[str, ...]:
    """The cells of `COLUMNS` after the level's number."""
    return (
        component.name,
        ", ".join(component.part),
        str(len(component.where) or ""),
        str(component.frequency),
        f"{component.parameters:,}" if component.parameters else "",
        state_label(component),
    )


def tree(levels: Sequence[DescribedLevel], transfers: Sequence[Transfer]) -> Tree:
    """Per level what its components learn and how, then what passes between them.

    Components that differ in nothing but their names share a leaf.
    """
    root = Tree(Text("levels, from the fastest to the slowest"))
    for level in levels:
        branch = root.add(Text(str(level), style="bold"))
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for component in level.components:
            alike[component.context, component.objective, component.rule].append(component.name)
        for texts, names in alike.items():
            leaf = branch.add(Text(", ".join(names), style="cyan"))
            for label, text in zip(("context", "objective", "rule"), texts, strict=True):
                if text and text != "none":
                    leaf.add(Text(f"{label}: {text}"))
    branch = root.add(Text("what passes", style="bold"))
    passed: dict[str, Tree] = {}
    for transfer in transfers:
        if transfer.kind not in passed:
            passed[transfer.kind] = branch.add(Text(transfer.kind, style="cyan"))
        source, target = map(_listed, ends(transfer, levels))
        passed[transfer.kind].add(Text(f"{transfer.what}: {source} → {target}"))
    return root


def _listed(side: list[End]) -> str:
    return ", ".join(end if isinstance(end, str) else f"all of level {end.number}" for end in side)


def to_text(shown: RenderableType) -> str:
    """Text as rich would show it, without colours and trailing spaces."""
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None, force_terminal=False).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
