"""A search over a grid of settings: each model finds its own on one seed, and is compared on others.

All models try the same settings, in turns on the same batches, so a budget of time is split evenly: a setting
that does not fit any more is left out for all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nested_learning.training.contestants import Contestant
from nested_learning.training.grid import Grid, Setting, settings_of, tuned

RunFigures = dict[str, Any]
TUNING_SEED = 1000  # as in evaluations


class Rounds(Protocol):
    """Trainer of contestants, one step of each in turn."""

    def finished(self, contestants: list[Contestant], seed: int) -> bool:
        """Whether all these runs were finished before and cost nothing."""

    def run(self, contestants: list[Contestant], seed: int, label: str) -> list[RunFigures]:
        """The run of each contestant at a seed; `label` is for a bar."""

    def skip(self) -> None:
        """Count one round less than there might have been."""


class SearchClock:
    """Time of a search, which may be limited.

    Args:
        minutes: how long; None for no limit.
        steps: optimizer steps of a round.
        clock: seconds since some moment.
    """

    def __init__(
        self, minutes: float | None, steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = None if minutes is None else minutes * 60
        self.steps, self.clock, self.start = steps, clock, clock()
        self.round_seconds = 0.0  # of the longest round so far

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def note(self, runs: Sequence[RunFigures], started: float) -> None:
        """Learn from a round that began at `started` how long one takes, also if some of it was finished."""
        stepping = sum((run["median_step_seconds"] or 0.0) * self.steps for run in runs)
        self.round_seconds = max(self.round_seconds, stepping, self.clock() - started)

    def holds(self, rounds: int) -> bool:
        """Whether so many more rounds will probably end in time."""
        return self.limit is None or self.seconds + rounds * self.round_seconds <= self.limit


@dataclass
class Found:
    """Findings of a search.

    Attributes:
        runs: those of the best settings at the seeds of the comparison; each says its "setting".
        tried: those at the tuning seed.
        best: the chosen setting by model's name; None where every setting diverged.
        cut: settings that the budget left no time for.
        cut_seeds: seeds that it left no time for.
        seconds: length of the search.
    """

    runs: list[RunFigures] = field(default_factory=list)
    tried: list[RunFigures] = field(default_factory=list)
    best: dict[str, Setting | None] = field(default_factory=dict)
    cut: list[Setting] = field(default_factory=list)
    cut_seeds: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self, seed: int, budget_minutes: float | None) -> dict[str, Any]:
        """The search without its final runs, fit for JSON."""
        return {
            "seed": seed,
            "budget_minutes": budget_minutes,
            "minutes": self.seconds / 60,
            "runs": self.tried,
            "cut_settings": self.cut,
            "cut_seeds": self.cut_seeds,
        }

    def settings_of(self, model: str) -> list[dict[str, Any]]:
        """Every setting that a model tried, with its loss and whether it was chosen."""
        return [
            {
                "setting": run["setting"],
                "nats_per_token": run["nats_per_token"],
                "bits_per_byte": run["bits_per_byte"],
                "chosen": run["setting"] == self.best[model],
            }
            for run in self.tried
            if run["model"] == model
        ]


def search(
    contestants: list[Contestant],
    grid: Grid,
    tuning_seed: int,
    seeds: Sequence[int],
    rounds: Rounds,
    budget: SearchClock,
) -> Found:
    """Try a grid at the tuning seed, then run each model with its best setting at every seed.

    A first setting and one seed are always run. With a budget the settings come in a shuffled order, the same
    each time, so that what is left out does not lie in one corner of the grid, and time for all seeds is kept
    aside while they are tried.

    Args:
        contestants: models and what trains them, before any setting.
        grid: values by key.
        tuning_seed: seed on which settings are compared.
        seeds: seeds of the comparison.
        rounds: what trains.
        budget: time for all rounds.
    """
    settings = settings_of(grid)
    order = list(range(len(settings)))
    if budget.limit is not None:
        random.Random(0).shuffle(order)
    found, tried = Found(), dict[int, list[RunFigures]]()
    for number, index in enumerate(order):
        chosen = [tuned(each, settings[index]) for each in contestants]
        time_left = budget.holds(1 + len(seeds)) or rounds.finished(chosen, tuning_seed)
        if tried and not time_left:
            rounds.skip()
            continue
        started = budget.clock()
        runs = rounds.run(chosen, tuning_seed, f"setting {number + 1} of {len(order)}")
        budget.note(runs, started)
        tried[index] = [{**run, "setting": settings[index]} for run in runs]
    found.tried = [run for index in sorted(tried) for run in tried[index]]
    found.cut = [setting for index, setting in enumerate(settings) if index not in tried]
    found.best = {each.name: _best(found.tried, each.name) for each in contestants}
    ready = [(each, best) for each in contestants if (best := found.best[each.name]) is not None]
    final = [tuned(each, best) for each, best in ready]
    for number, seed in enumerate(seeds):
        if found.runs and not (budget.holds(1) or rounds.finished(final, seed)):
            found.cut_seeds.append(seed)
            rounds.skip()
            continue
        if not final:
            break
        started = budget.clock()
        runs = rounds.run(final, seed, f"seed {number + 1} of {len(seeds)}")
        budget.note(runs, started)
        found.runs += [{**run, "setting": best} for run, (_, best) in zip(runs, ready, strict=True)]
    found.seconds = budget.seconds
    return found


def _best(runs: list[RunFigures], model: str) -> Setting | None:
    """The setting of a model's run with the least loss, the first of equals."""
    finite = [run for run in runs if run["model"] == model and run["nats_per_token"] is not None]
    return min(finite, key=lambda run: run["nats_per_token"])["setting"] if finite else None
