"""Results that survive an interruption, tuning, statistics, claims and figures, shared by all parts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, TypedDict

from nested_learning._files import replacing, write_text
from nested_learning.training.report import git_revision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]
REPORTED = 5.0  # seconds; longer runs are announced when they end


class OutOfTime(Exception):
    """The time limit leaves no room for another run."""


class Claim(TypedDict):
    """A statement of the paper, and whether the figures of this run bear it out."""

    claim: str
    holds: bool
    because: str


class Cache:
    """Results by the settings of their run, in a JSON file, so that an interrupted benchmark goes on.

    The file is rewritten (to a temporary name, then renamed) after a run, but at most once a second; `flush`
    writes the rest. It tells the git revision of each result but does not compare it: delete the file after
    a change of what is measured.

    Args:
        path: the file; None keeps the results for this process only.
        max_minutes: no run is started that, by the duration of the longest so far, would end later.

    Raises:
        ValueError: the file is there but is no such cache.
    """

    def __init__(self, path: Path | None = None, max_minutes: float | None = None) -> None:
        self.path, self.written, self.git = path, time.monotonic(), git_revision()
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.longest = 0.0
        self.results: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self.results = json.loads(path.read_text())["results"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is no cache of these benchmarks ({error}); name another --cache, or delete it"
                ) from error

    def get(self, settings: Settings, work: Callable[[], Any]) -> Any:
        """The result of the run with these settings (fit for JSON): kept, or worked out by `work` and kept.

        Raises:
            OutOfTime: there is no room for `work` before the time limit.
        """
        key = json.dumps(settings, sort_keys=True)
        if key not in self.results:
            start = time.monotonic()
            if start + self.longest > self.deadline:
                raise OutOfTime
            result = work()
            seconds = time.monotonic() - start
            self.longest = max(self.longest, seconds)
            self.results[key] = {"result": result, "git": self.git, "seconds": round(seconds, 3)}
            if time.monotonic() > self.written + 1:
                self.flush()
            if seconds > REPORTED:
                print(f"{seconds:6.0f} s  {key}", flush=True)
        return self.results[key]["result"]

    def flush(self) -> None:
        """Write the file."""
        if self.path is not None:
            self.written = time.monotonic()
            write_text(self.path, json.dumps({"results": self.results}) + "\n")


def finite(value: float) -> float | None:
    """The value, or None, which JSON can hold, for one that is not finite: the run diverged."""
    return value if math.isfinite(value) else None


def best(rates: Sequence[float], score: Callable[[float], float | None]) -> float:
    """The learning rate with the lowest score; one with score None, a run that diverged, is never it.

    Raises:
        ValueError: every rate diverged.
    """
    scores = {rate: score(rate) for rate in rates}
    found = {rate: value for rate, value in scores.items() if value is not None}
    if not found:
        raise ValueError(f"every learning rate of {list(rates)} diverged; extend the grid downwards")
    return min(found, key=lambda rate: found[rate])


def search(rates: Sequence[float], score: Callable[[float], float | None], start: float) -> float:
    """The rate of an ascending grid from which no neighbour scores lower, found from `start`.

    Spares the runs of rates that are far off. A rate with score None, a run that diverged, is never it.

    Raises:
        ValueError: the lowest rate diverged as well.
    """
    scores: dict[int, float] = {}

    def scored(index: int) -> float:
        if index not in scores:
            value = score(rates[index])
            scores[index] = math.inf if value is None else value
        return scores[index]

    at = rates.index(start)
    while True:
        near = [at, *(i for i in (at - 1, at + 1) if 0 <= i < len(rates))]
        lowest = min(near, key=scored)
        if scores[lowest] == math.inf:
            if at == 0:
                raise ValueError(
                    f"the lowest learning rate of {list(rates)} diverged; extend the grid downwards"
                )
            lowest = at - 1
        elif lowest == at:
            return rates[at]
        at = lowest


def mean(values: Iterable[float | None]) -> float | None:
    """Mean over seeds; None if one of them diverged."""
    kept = list(values)
    return None if None in kept else fmean(v for v in kept if v is not None)


def spread(values: Iterable[float | None]) -> float | None:
    """Standard deviation over seeds; None if one of them diverged, 0 for a single seed."""
    kept = [v for v in values if v is not None]
    return stdev(kept) if len(kept) > 1 else 0.0


def edge(rate: float, rates: Sequence[float]) -> str:
    """The rate as text, with a star where it is the end of its grid: the best one may lie beyond."""
    return f"{rate:g}{'*' if rate in (min(rates), max(rates)) else ''}"


def plus_minus(row: Mapping[str, Any], score: str) -> str:
    """Mean and standard deviation over seeds of a row with the keys `score` and `± score`, as text."""
    if row[score] is None:
        return "diverged"
    return f"{row[score]:.4g} ± {row[f'± {score}']:.1g}"


def table(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table: the optimizer, its learning rate and its scores as `plus_minus`."""
    return [
        {"optimizer": row["optimizer"], "lr": row["lr"], **{each: plus_minus(row, each) for each in scores}}
        for row in rows
    ]


def below(a: float | None, b: float | None) -> bool:
    """a < b where a run that diverged (None) is above all."""
    return a is not None and (b is None or a < b)


def show_claims(claims: Sequence[Claim]) -> None:
    """Print each claim with whether it holds, and the figures that say so."""
    for claim in claims:
        print(f"{'HOLDS' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}\n    {claim['because']}")


def new_figure(columns: int, width: float = 4.0, height: float = 3.4) -> tuple[Figure, list[Any]]:
    """A figure with `columns` axes beside each other, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
