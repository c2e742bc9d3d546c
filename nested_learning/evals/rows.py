"""Figures of methods, seed by seed: what claims are judged by and tables are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from nested_learning._checks import shown

Figures = dict[str, Any]  # of one run, fit for JSON: numbers by name, and what a plot needs besides


def checked_figures(found: object, numbers: Iterable[str]) -> Figures:
    """The figures of a run as JSON gives them back, so that they are the same whether kept or not.

    Args:
        found: what a run gave.
        numbers: names of the figures that have to be numbers, where they are there and not None.

    Raises:
        ValueError: it is no mapping, JSON cannot hold a figure, or one of those is no number.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"its figures are {shown(found)}; expected a mapping of numbers by name")
    for name, value in found.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as problem:
            raise ValueError(
                f"its figure {name} is {shown(value)}, which JSON does not hold ({problem}); expected finite "
                "numbers of Python, such as those of float(), in lists and mappings at most"
            ) from None
        if _beyond_floats(value):
            raise ValueError(
                f"its figure {name} is {shown(value)}, too large for tables and claims; expected numbers "
                "of at most 1e308 in size"
            )
    figures: Figures = json.loads(json.dumps(dict(found)))
    for name in numbers:
        if not isinstance(figures.get(name), (int, float, type(None))):
            raise ValueError(f"its figure {name} is {shown(figures[name])}; expected a number")
    return figures


def _beyond_floats(value: object) -> bool:
    """Whether a whole number in a value that JSON holds has no float near it."""
    rest = [value]
    while rest:
        each = rest.pop()
        if isinstance(each, Mapping):
            rest += each.values()
        elif isinstance(each, (list, tuple)):
            rest += each
        elif isinstance(each, int) and abs(each) > sys.float_info.max:
            return True
    return False


@dataclass(frozen=True)
class MethodRow:
    """Figures of a method, seed by seed.

    Attributes:
        method: its name.
        settings: chosen from the task's grid for it, on the tuning seeds.
        figures: by seed, of every run that ended.
        errors: by seed, what ended a run that did not.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[int, Figures] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)

    def values(self, figure: str) -> dict[int, float]:
        """The figure by seed, of the runs that have it."""
        found = {seed: figures.get(figure) for seed, figures in self.figures.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def items(self, figure: str) -> dict[tuple[int, int], float]:
        """The figure by seed and place in a list; the place is 0 where it is a single number."""
        found = {}
        for seed, figures in self.figures.items():
            value = figures.get(figure)
            for place, item in enumerate(value if isinstance(value, list) else [value]):
                if item is not None:
                    found[seed, place] = float(item)
        return found

    def mean(self, figure: str) -> float | None:
        """Mean over the seeds, or None where no run has the figure."""
        values = self.values(figure).values()
        return fmean(values) if values else None

    def spread(self, figure: str) -> float | None:
        """Standard deviation over the seeds (n - 1), or None for fewer than two."""
        values = list(self.values(figure).values())
        return stdev(values) if len(values) > 1 else None


MethodRows = Mapping[str, MethodRow]  # by method, in the order of the table
