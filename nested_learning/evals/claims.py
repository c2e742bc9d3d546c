"""Verdicts on claims, computed from rows: holds, does not, cannot be told here.

A comparison of two methods is decided by the paired differences of their figures by seed, or item by item
where the figure is a list with a value of each item: it holds where the 95 % interval of Student's t lies on
the claimed side of 0 (or of a margin), does not where it lies on the other one. A chain
holds if every pair of neighbours does, and does not if one pair does not. A figure that a method is said to
reach is reached if every seed does, and is not if none does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple, Protocol

from nested_learning.evals.rows import MethodRow, MethodRows

HOLDS, DOES_NOT, UNTOLD = "holds", "does not", "cannot be told here"


class Verdict(NamedTuple):
    """A verdict and the figures that it rests on, in words."""

    verdict: str
    because: str


class Claim(Protocol):
    """A statement that rows decide: a predicate on rows, with its words and its source."""

    @property
    def text(self) -> str:
        """The statement in words."""

    @property
    def source(self) -> str:
        """Table, figure or equation that states it."""

    def judge(self, rows: MethodRows) -> Verdict:
        """The verdict; "cannot be told here" where a row is missing."""


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of the mean of paired differences; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    half = t_quantile(count - 1) * stdev(differences) / math.sqrt(count)
    return fmean(differences) - half, fmean(differences) + half


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    low, high = 1.9, 12.8  # around that of the normal distribution and that of one degree
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """The probability of a value between −t and t, a finite series (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for place in range(1, freedom // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * place - 1 + odd) / (2 * place + odd)
    area = math.sin(angle) * total
    return 2 / math.pi * (angle + area) if odd else area


@dataclass(frozen=True)
class Ahead:
    """The claim that methods stand in an order: each ahead of the next in one figure.

    Attributes:
        text: in words.
        source: table, figure or equation that states it.
        figure: name of the figure that is compared.
        order: methods, the best first; two or more.
        higher: whether more is better.
        chance: figure of guessing: where every method but the first has an interval that reaches down to it,
            nothing can be told. None: a figure at chance is an answer.
        margin: by how much each is ahead of the next at least; below 0: by how much it may be behind.
        factor: how many times over the figure of the better one counts: 3 where it is said to have at most a
            third of the other's damage, 0.5 where it has at least twice the other's recall.
        unit: word for what the figures are paired by.
    """

    text: str
    source: str
    figure: str
    order: tuple[str, ...]
    higher: bool = True
    chance: float | None = None
    margin: float = 0.0
    factor: float = 1.0
    unit: str = "seeds"

    def judge(self, rows: MethodRows) -> Verdict:
        """The verdict on the chain, and each pair's mean difference with its interval."""
        missing = [name for name in self.order if name not in rows or not rows[name].items(self.figure)]
        if missing:
            return Verdict(UNTOLD, f"no figures of {', '.join(missing)}")
        others = [rows[name] for name in self.order[1:]]
        if self.chance is not None and all(self._at_chance(row) for row in others):
            return Verdict(
                UNTOLD, f"{', '.join(self.order[1:])}: {self.figure} at chance ({self.chance:.3g})"
            )
        pairs = [self._pair(rows[a], rows[b]) for a, b in zip(self.order[:-1], self.order[1:], strict=True)]
        verdicts = {pair.verdict for pair in pairs}
        verdict = DOES_NOT if DOES_NOT in verdicts else UNTOLD if UNTOLD in verdicts else HOLDS
        return Verdict(verdict, "; ".join(pair.because for pair in pairs))

    def _at_chance(self, row: MethodRow) -> bool:
        assert self.chance is not None
        values = list(row.items(self.figure).values())
        found = interval(values) or (fmean(values),) * 2
        return found[0] <= self.chance if self.higher else found[1] >= self.chance

    def _pair(self, better: MethodRow, worse: MethodRow) -> Verdict:
        ours, theirs = better.items(self.figure), worse.items(self.figure)
        shared = sorted(ours.keys() & theirs.keys())
        differences = [self.factor * ours[each] - theirs[each] for each in shared]
        found = interval(differences)
        words = f"{'' if self.factor == 1 else f'{self.factor:g} · '}{better.method} − {worse.method}"
        if found is None:
            mean = f"{differences[0]:+.4g}" if differences else f"no {self.unit} in common"
            return Verdict(UNTOLD, f"{words} {mean} ({len(differences)} {self.unit})")
        low, high = found
        because = f"{words} {fmean(differences):+.4g} [{low:+.4g}, {high:+.4g}], {len(shared)} {self.unit}"
        if self.margin:
            because += f", margin {self.margin:g}"
        if not self.higher:
            low, high = -high, -low
        return Verdict(HOLDS if low > self.margin else DOES_NOT if high < self.margin else UNTOLD, because)


@dataclass(frozen=True)
class Keeps:
    """The claim that a method is as good under a harder condition (a longer sequence) as under the plain one.

    Attributes:
        text: in words.
        source: table, figure or equation that states it.
        method: the method.
        figure, harder: names of the two figures, both the better the higher.
        margin: how much lower the harder one may be and still count as kept.
        chance: figure of guessing: where the plain one's interval reaches down to it nothing can be told.
    """

    text: str
    source: str
    method: str
    figure: str
    harder: str
    margin: float = 0.02
    chance: float = 0.0

    def judge(self, rows: MethodRows) -> Verdict:
        """The verdict by the paired differences of the seeds, and their mean with its interval."""
        row = rows.get(self.method)
        plain = {} if row is None else row.values(self.figure)
        harder = {} if row is None else row.values(self.harder)
        seeds = sorted(plain.keys() & harder.keys())
        differences = [harder[seed] - plain[seed] for seed in seeds]
        found, reached = interval(differences), interval([plain[seed] for seed in seeds])
        if found is None or reached is None:
            return Verdict(UNTOLD, f"figures of {self.method}: {len(seeds)} seed(s), at least 2 are needed")
        low, high = found
        because = (
            f"{self.method} {self.harder} − {self.figure} {fmean(differences):+.4g} "
            f"[{low:+.4g}, {high:+.4g}], {len(seeds)} seeds"
        )
        if reached[0] <= self.chance:
            return Verdict(UNTOLD, f"{self.figure} at chance ({self.chance:.3g}); {because}")
        verdict = HOLDS if low >= -self.margin else DOES_NOT if high < -self.margin else UNTOLD
        return Verdict(verdict, because)


@dataclass(frozen=True)
class Reaches:
    """The claim that a method reaches a figure.

    Attributes:
        text: in words.
        source: table, figure or equation that states it.
        method: the method.
        bounds: figures by name, all of which it is said to reach.
        higher: whether at least (or at most) these.
    """

    text: str
    source: str
    method: str
    bounds: Mapping[str, float]
    higher: bool = True

    def judge(self, rows: MethodRows) -> Verdict:
        """The verdict, and each seed's figures."""
        row = rows.get(self.method)
        figures = {} if row is None else {name: row.values(name) for name in self.bounds}
        seeds = sorted(set.intersection(*(set(values) for values in figures.values()))) if figures else []
        if not seeds:
            return Verdict(UNTOLD, f"no figures of {self.method}")
        reached = [
            all(
                (figures[name][seed] >= bound) if self.higher else (figures[name][seed] <= bound)
                for name, bound in self.bounds.items()
            )
            for seed in seeds
        ]
        because = "; ".join(
            f"{self.method} {name}: {', '.join(f'{figures[name][seed]:.4g}' for seed in seeds)}"
            for name in self.bounds
        )
        verdict = HOLDS if all(reached) else UNTOLD if any(reached) else DOES_NOT
        return Verdict(verdict, because)
