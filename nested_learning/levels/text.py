"""A nested system on a terminal: a table of numbers, and a tree of who learns what, how and from whom."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from nested_learning.levels.system import Component, Level, NestedSystem

COLUMNS = ("level", "component", "modules", "updated", "parameters", "state")
WIDTH = 110  # of text that is not for a terminal


def state_text(component: Component) -> str:
    """`262,144 B per sequence`; `unknown` where it is."""
    if component.state_bytes is None:
        return "unknown"
    per = "" if component.state_per == "model" else f" per {component.state_per}"
    return f"{component.state_bytes:,} B{per}"


def rows(system: NestedSystem) -> list[tuple[str, ...]]:
    """The table's cells, see `COLUMNS`."""
    return [
        (
            str(level.number),
            component.name,
            str(len(component.where) or ""),
            str(component.frequency),
            f"{component.parameters:,}" if component.parameters else "",
            state_text(component),
        )
        for level in system.levels
        for component in level.components
    ]


def gathered(system: NestedSystem, ends: Sequence[str], others: Sequence[str]) -> list[str | Level]:
    """One end of a transfer: a level where all in it take part and the other end lies outside, else names."""
    found: list[str | Level] = []
    left = list(ends)
    for level in system.levels:
        names = {component.name for component in level.components}
        if len(names) > 1 and names <= set(left) and not names & set(others):
            found.append(level)
            left = [name for name in left if name not in names]
    return found + left


def table(system: NestedSystem) -> Table:
    """Levels and components with their numbers."""
    title = f"{system.name}, optimizer {system.optimizer}, {system.parameters:,} parameters"
    drawn = Table(title=title, title_justify="left")
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column in ("component", "updated") else "right")
    before = None
    for row in rows(system):
        if before not in (None, row[0]):
            drawn.add_section()
        drawn.add_row(*(Text(cell) for cell in ("" if before == row[0] else row[0], *row[1:])))
        before = row[0]
    return drawn


def tree(system: NestedSystem) -> Tree:
    """Per level what its components learn and how, components that differ in nothing but name together; then
    what passes between them."""
    root = Tree(Text("levels, from the fastest to the slowest"))
    for level in system.levels:
        branch = root.add(Text(str(level), style="bold"))
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for component in level.components:
            alike[component.context, component.objective, component.rule].append(component.name)
        for texts, names in alike.items():
            leaf = branch.add(Text(", ".join(names), style="cyan"))
            for label, text in zip(("context", "objective", "rule"), texts, strict=True):
                if text and text != "none":
                    leaf.add(Text(f"{label}: {text}"))
    passed: dict[str, Tree] = {}
    branch = root.add(Text("what passes", style="bold"))
    for transfer in system.transfers:
        if transfer.kind not in passed:
            passed[transfer.kind] = branch.add(Text(transfer.kind, style="cyan"))
        source = _ends(gathered(system, transfer.sources, transfer.targets))
        target = _ends(gathered(system, transfer.targets, transfer.sources))
        passed[transfer.kind].add(Text(f"{transfer.what}: {source} → {target}"))
    return root


def _ends(ends: list[str | Level]) -> str:
    return ", ".join(end if isinstance(end, str) else f"all of level {end.number}" for end in ends)


def to_text(system: NestedSystem) -> str:
    """Table and tree without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
    console.print(Group(table(system), tree(system)))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
