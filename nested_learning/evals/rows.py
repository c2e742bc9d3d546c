"""Figures of methods, seed by seed: what claims are judged by and tables are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

Figures = dict[str, Any]  # of one run, fit for JSON: numbers by name, and what a plot needs besides


@dataclass(frozen=True)
class MethodRow:
    """Figures of a method, seed by seed.

    Attributes:
        method: its name.
        settings: chosen from the task's grid for it, on the tuning seed.
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
