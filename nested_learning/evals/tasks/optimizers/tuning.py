"""Choice of settings on several seeds, where one alone is too noisy."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from nested_learning.evals.rows import Figures


def mean_over_seeds(run: Callable[[int], Figures], figure: str, first: int, count: int) -> Figures:
    """The mean of a figure over the seeds from `first` on; None where a run diverged."""
    values = [run(seed)[figure] for seed in range(first, first + count)]
    return {figure: None if None in values else fmean(values)}
