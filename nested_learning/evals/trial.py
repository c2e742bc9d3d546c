"""One run of a method on a task at a seed, and the folder that keeps finished ones."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nested_learning._tensor_files import parse_json
from nested_learning._workers import end_with_parent
from nested_learning.evals.method import Method
from nested_learning.evals.rows import Figures
from nested_learning.evals.task import Task
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, versions
from nested_learning.training.run_cache import RunCache

FOUND = ("figures", "seconds", "error", "made")  # names of a line that do not decide the trial
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
        return TrialOutcome(self, figures, time.perf_counter() - start, error, made_here())

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
        made: where and when: versions, git revision, processor, threads, day; empty where it is not known.
    """

    trial: Trial
    figures: Figures | None
    seconds: float
    error: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """The outcome as a line of trials.jsonl, which `TrialCache` reads again."""
        found = {"figures": self.figures, "seconds": self.seconds, "error": self.error}
        return {**self.trial.key(), **found, "made": dict(self.made)}


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    found, machine = versions(), hardware(process_state().device)
    return {**found, "device_name": machine["device_name"], "threads": machine["threads"]}


def made_here() -> dict[str, Any]:
    """Versions, machine and day of a run in this process."""
    return {**_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


class TrialCache:
    """Finished trials: those of a folder, a file each, and those of files of others, a line each.

    One that was made with other versions of this package, torch or transformers is made again, with a
    warning; a failed one is not kept.

    Args:
        folder: new ones are written there; None: nothing is kept.
        finished: files trials.jsonl that other evaluations wrote, on this machine or on others.

    Raises:
        ValueError: a file of `finished` cannot be read, or a line of it is no trial.
    """

    def __init__(self, folder: Path | None, finished: Sequence[str | Path] = ()) -> None:
        self.cache = RunCache(folder)
        found = versions()
        self.versions = {name: found[name] for name in COUNTED}
        self._given: dict[str, dict[str, Any]] = {}
        for path in finished:
            for line in finished_lines(Path(path)):
                self._given.setdefault(identity_of(line), {**line, "versions": line["made"]})

    def find(self, trial: Trial) -> TrialOutcome | None:
        """The outcome that was kept, if it is of these versions; the folder's before that of a file."""
        key = trial.key()
        for kept in (self.cache.find(key), self._given.get(identity_of(key))):
            if kept is not None and self._of_these_versions(trial, kept):
                return TrialOutcome(trial, kept["figures"], kept["seconds"], made=kept.get("made", {}))
        return None

    def _of_these_versions(self, trial: Trial, kept: dict[str, Any]) -> bool:
        made_with = {name: kept.get("versions", {}).get(name) for name in self.versions}
        if made_with == self.versions:
            return True
        differing = [
            f"{name} {made_with[name]}, here {version}"
            for name, version in self.versions.items()
            if made_with[name] != version
        ]
        warnings.warn(
            f"{trial} was kept by {'; '.join(differing)}: it is made again", RuntimeWarning, stacklevel=3
        )
        return False

    def keep(self, outcome: TrialOutcome) -> TrialOutcome:
        """Write an outcome with figures; one with NaN or infinity among them, which JSON has not, failed."""
        if outcome.error is not None:
            return outcome
        result = {
            "figures": outcome.figures,
            "seconds": outcome.seconds,
            "versions": self.versions,
            "made": dict(outcome.made),
        }
        try:
            self.cache.keep(outcome.trial.key(), result)
        except (ValueError, TypeError) as problem:
            error = f"its figures are not fit for JSON: {problem}"
            return dataclasses.replace(outcome, figures=None, error=error)
        return outcome


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file trials.jsonl, as `TrialOutcome.line` has them, without the failed trials.

    Raises:
        ValueError: the file cannot be read, or a line is no trial.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a trials.jsonl that `nested-learning eval` wrote"
        ) from None
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = parse_json(text)
            if not isinstance(line, dict) or line.get("what") != "trial":
                raise ValueError("it is no trial")
            figures, _, ended_by = (line[name] for name in ("figures", "seconds", "error"))
            if (figures is not None and not isinstance(figures, dict)) or not isinstance(
                line.setdefault("made", {}), dict
            ):
                raise ValueError("its figures are no mapping")
        except (ValueError, KeyError) as problem:
            raise ValueError(
                f"line {number} of {path} is not fit: {problem}; expected a line of a trials.jsonl that "
                "`nested-learning eval` wrote"
            ) from None
        if ended_by is None and figures is not None:
            found.append(line)
    return found


def identity_of(line: Mapping[str, Any]) -> str:
    """Text of all that decides a trial, from its key or its line; equal where their JSON is."""
    return json.dumps({name: line[name] for name in line if name not in FOUND}, sort_keys=True)


def start_worker(threads: int) -> None:
    """Let torch use so many threads, and end with the parent; what a worker process calls first."""
    end_with_parent()
    torch.set_num_threads(threads)
