"""Labels that text, flowchart and picture have in common."""

from __future__ import annotations

from collections.abc import Sequence

from nested_learning.levels.components import Component, DescribedLevel, Transfer

End = str | DescribedLevel  # of a transfer: a component by its name, or all of a level


def state_label(component: Component) -> str:
    """The bytes of a component's state, such as `262,144 B per sequence`, or `unknown`."""
    if component.state_bytes is None:
        return "unknown"
    per = "" if component.state_per == "model" else f" per {component.state_per}"
    return f"{component.state_bytes:,} B{per}"


def ends(transfer: Transfer, levels: Sequence[DescribedLevel]) -> tuple[list[End], list[End]]:
    """Sources and targets of a transfer.

    A level stands for its components where all of them take part and the other end lies outside of it.
    """
    sources, targets = transfer.sources, transfer.targets
    return _gathered(levels, sources, targets), _gathered(levels, targets, sources)


def _gathered(levels: Sequence[DescribedLevel], names: Sequence[str], others: Sequence[str]) -> list[End]:
    whole: list[End] = []
    left = list(names)
    for level in levels:
        members = {component.name for component in level.components}
        if len(members) > 1 and members <= set(left) and not members & set(others):
            whole.append(level)
            left = [name for name in left if name not in members]
    return whole + left
