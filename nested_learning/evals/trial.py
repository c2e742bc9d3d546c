"""One run of a method on a task at a seed, and the folder that keeps finished ones."""

from __future__ import annotations

import dataclasses
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nested_learning.evals.method import Method
from nested_learning.evals.rows import Figures
from nested_learning.evals.task import Task
from nested_learning.training.process import process_state
from nested_learning.training.report import versions
from nested_learning.training.run_cache import RunCache

COUNTED = ("nested_learning", "torch", "transformers")  # packages whose version decides figures


@dataclass(frozen=True)
class Trial:
    """A run to be made.

    Attributes:
        task: at its options.
        method: at its settings.
        seed: decides all randomness.
        tuning: whether it chooses settings (`Task.tune`) or is reported (`Task.run`).
    """

    task: Task[Any]
    method: Method
    seed: int
    tuning: bool = False

    def key(self) -> dict[str, Any]:
        """All that decides the figures but for the versions of packages."""
        return {
            "what": "trial",
            "task": self.task.name,
            "version": self.task.version,
            "options": {k: v for k, v in dataclasses.asdict(self.task.options).items() if k != "seeds"},
            "method": self.method.describe(),
            "seed": self.seed,
            "tuning": self.tuning,
            "device": process_state().device.type,
        }

    def run(self) -> TrialOutcome:
        """The figures and the time they took, or the error that ended the run."""
        start = time.perf_counter()
        figures: Figures | None = None
        error = None
        try:
            figures = (self.task.tune if self.tuning else self.task.run)(self.method, self.seed)
        except Exception as problem:  # others go on; the report names it
            error = f"{type(problem).__name__}: {problem}"
        return TrialOutcome(self, figures, time.perf_counter() - start, error)

    def __str__(self) -> str:
        tuned = ", ".join(f"{name} {value}" for name, value in self.method.settings.items())
        words = [self.task.name, self.method.name, f"({tuned})" if tuned else "", f"seed {self.seed}"]
        return " ".join([*filter(None, words), *(["tuning"] if self.tuning else [])])


@dataclass(frozen=True)
class TrialOutcome:
    """Figures of a trial, or the error that ended it.

    Attributes:
        trial: the trial.
        figures: of a run that ended.
        seconds: that it took.
        error: what ended a run that did not.
    """

    trial: Trial
    figures: Figures | None
    seconds: float
    error: str | None = None

    def line(self) -> dict[str, Any]:
        """The outcome as a line of trials.jsonl."""
        return {**self.trial.key(), "figures": self.figures, "seconds": self.seconds, "error": self.error}


class TrialCache:
    """Finished trials in a folder, a file each.

    One that was made with other versions of this package, torch or transformers is made again, with a
    warning; a failed one is not kept.

    Args:
        folder: None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.cache = RunCache(folder)
        found = versions()
        self.versions = {name: found[name] for name in COUNTED}

    def find(self, trial: Trial) -> TrialOutcome | None:
        """The outcome that was kept, if it is of these versions."""
        kept = self.cache.find(trial.key())
        if kept is None:
            return None
        if kept["versions"] != self.versions:
            differing = [
                f"{name} {kept['versions'].get(name)}, here {version}"
                for name, version in self.versions.items()
                if kept["versions"].get(name) != version
            ]
            warnings.warn(
                f"{trial} was kept by {'; '.join(differing)}: it is made again", RuntimeWarning, stacklevel=2
            )
            return None
        return TrialOutcome(trial, kept["figures"], kept["seconds"])

    def keep(self, outcome: TrialOutcome) -> TrialOutcome:
        """Write an outcome with figures; one with NaN or infinity among them, which JSON has not, failed."""
        if outcome.error is not None:
            return outcome
        result = {"figures": outcome.figures, "seconds": outcome.seconds, "versions": self.versions}
        try:
            self.cache.keep(outcome.trial.key(), result)
        except (ValueError, TypeError) as problem:
            error = f"its figures are not fit for JSON: {problem}"
            return dataclasses.replace(outcome, figures=None, error=error)
        return outcome


def set_threads(count: int) -> None:
    """Let torch use so many threads; what a worker process calls first."""
    torch.set_num_threads(count)
