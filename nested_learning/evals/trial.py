"""One run of a method on a task at a seed, and its outcome."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import torch

from nested_learning._workers import end_with_parent
from nested_learning.evals.method import Method
from nested_learning.evals.rows import Figures, checked_figures
from nested_learning.evals.task import OF_NO_RUN, Task
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, versions


def error_text(problem: BaseException) -> str:
    """The kind and the message of an error, as files hold it: whatever its message has or does."""
    try:
        message = str(problem)
    except Exception as another:
        message = f"its message cannot be read ({type(another).__name__})"
    text = f"{type(problem).__name__}: {message}" if message else type(problem).__name__
    return text.encode(errors="replace").decode()  # half a surrogate pair is no text


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
            "options": {k: v for k, v in dataclasses.asdict(self.task.options).items() if k not in OF_NO_RUN},
            "method": self.method.describe(),
            "seed": self.seed,
            "tuning": self.tuning,
            "device": process_state().device.type,
        }

    def run(self) -> TrialOutcome:
        """The figures and the time they took, or the error that ended the run or made it unfit."""
        start = time.perf_counter()
        figures: Figures | None = None
        error = None
        try:
            found = (self.task.tune if self.tuning else self.task.run)(self.method, self.seed)
        except (Exception, SystemExit) as problem:  # others go on; the report names it
            error = error_text(problem)
        seconds = time.perf_counter() - start
        if error is None:
            try:
                figures = checked_figures(found, self.task.shown())
            except ValueError as problem:
                error = str(problem)
        return TrialOutcome(self, figures, seconds, error, made_here(), process_state().device.type)

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
        device: type of the device it was made on, which may be another machine's; None: of this process.
    """

    trial: Trial
    figures: Figures | None
    seconds: float
    error: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def line(self) -> dict[str, Any]:
        """The outcome as a line of trials.jsonl, which `read_lines` reads again."""
        found = {"figures": self.figures, "seconds": self.seconds, "error": self.error}
        device = {} if self.device is None else {"device": self.device}
        return {**self.trial.key(), **device, **found, "made": dict(self.made)}


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    found, machine = versions(), hardware(process_state().device)
    return {**found, "device_name": machine["device_name"], "threads": machine["threads"]}


def made_here() -> dict[str, Any]:
    """Versions, machine and day of a run in this process."""
    return {**_machine(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def start_worker(threads: int) -> None:
    """Let torch use so many threads, and end with the parent; what a worker process calls first."""
    end_with_parent()
    torch.set_num_threads(threads)
