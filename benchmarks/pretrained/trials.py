"""Methods against each other: each at the rate that a seed of its own found, over the reported seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import Claim, below, best, edge, mean, plus_minus, spread
from benchmarks.pretrained.methods import Method

TUNING_SEED = 1000
Trial = dict[str, float | None]
Run = Callable[[Method, float | None, int], Trial]
Row = dict[str, Any]


def chosen(methods: Sequence[Method], names: Sequence[str] | None) -> list[Method]:
    """The methods with these names, all for None.

    Raises:
        ValueError: there is no method of that name.
    """
    known = {method.name: method for method in methods}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"unknown methods: {', '.join(unknown)}; expected some of: {', '.join(known)}")
    return [method for name, method in known.items() if names is None or name in names]


def compare(methods: Sequence[Method], seeds: Sequence[int], run: Run, objective: str) -> list[Row]:
    """Figures of each method at its best rate, mean and standard deviation over seeds.

    Args:
        methods: those without rates have nothing to tune.
        seeds: reported; TUNING_SEED is none of them.
        run: figures of a method at a rate on a seed; None for one that is not finite.
        objective: the figure that the rate is chosen for, on TUNING_SEED; the higher the better.

    Raises:
        ValueError: TUNING_SEED is among the seeds.
    """
    if TUNING_SEED in seeds:
        raise ValueError(f"seed {TUNING_SEED} is for tuning; report others")
    rows = []
    for method in methods:
        rate = _tuned(method, run, objective)
        trials = {seed: run(method, rate, seed) for seed in seeds}
        row: Row = {
            "method": method.name,
            "rate": rate,
            "lr": "" if rate is None else edge(rate, method.rates),
        }
        for figure in next(iter(trials.values())):
            values = [trial[figure] for trial in trials.values()]
            row |= {figure: mean(values), f"± {figure}": spread(values)}
        rows.append({**row, "trials": {str(seed): trial for seed, trial in trials.items()}})
    return rows


def _tuned(method: Method, run: Run, objective: str) -> float | None:
    if not method.rates:
        return None

    def cost(rate: float) -> float | None:
        value = run(method, rate, TUNING_SEED)[objective]
        return None if value is None else -value

    return best(method.rates, cost)


def as_table(rows: Sequence[Row], figures: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows to show: method, rate, and the figures (by name; their headings)."""
    return [
        {
            "method": row["method"],
            "lr": row["lr"],
            **{heading: plus_minus(row, figure) for figure, heading in figures.items()},
        }
        for row in rows
    ]


def claim(rows: Sequence[Row], text: str, figure: str, low: str, high: str) -> list[Claim]:
    """Claim that the mean of `figure` is lower for `low` than for `high`; none where one was not run."""
    found = {row["method"]: row for row in rows}
    if low not in found or high not in found:
        return []
    return [
        {
            "claim": text,
            "holds": below(found[low][figure], found[high][figure]),
            "because": f"{figure}: {low} {plus_minus(found[low], figure)}, "
            f"{high} {plus_minus(found[high], figure)}",
        }
    ]
