"""Definition 2 of "Nested Learning" (arXiv 2512.24695): components in the order of their levels.

A is faster than B if it is updated more often, or equally often and B's state at a time needs A's state at
that time. Components that are not ordered by it and have one frequency form a level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from nested_learning.levels.components import Component, DescribedLevel


def in_levels(components: Sequence[Component]) -> tuple[DescribedLevel, ...]:
    """Definition 2: by frequency, and within a frequency by who needs whose state.

    Components of one frequency that need each other by no chain go to the slowest level they can.

    Raises:
        ValueError: components of one frequency need each other in a circle.
    """
    height = _heights(components)

    def key(component: Component) -> tuple[int, int, int]:
        return *component.frequency.rank, -height(component.name)

    grouped: Iterator[tuple[Any, Iterator[Component]]] = groupby(sorted(components, key=key), key=key)
    return tuple(DescribedLevel(number, tuple(members)) for number, (_, members) in enumerate(grouped, 1))


def _heights(components: Sequence[Component]) -> Callable[[str], int]:
    """Length of the chain of components of the same frequency that need a component's state."""
    frequency = {component.name: component.frequency for component in components}
    needed_by: dict[str, list[str]] = {name: [] for name in frequency}
    for component in components:
        for other in component.needs:
            if frequency[other] == component.frequency:
                needed_by[other].append(component.name)
    known: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"components need each other in a circle: {' ← '.join((*above, name))}")
        if name not in known:
            known[name] = max((1 + height(other, (*above, name)) for other in needed_by[name]), default=0)
        return known[name]

    return height
