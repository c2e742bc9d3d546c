"""This commit against another one: the same works in a process for each, call by call in turn.

The other commit is a folder, such as `git worktree add ../before COMMIT` makes. Its package runs the cases of
this checkout (`benchmarks.cases`), so it needs to know nothing of them. Each commit runs in a worker process
of its own, so that neither has the memory and the imports of this one; while one works, the others wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import nested_learning
from benchmarks.harness import show
from nested_learning.training.report import git_revision

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.01  # seconds before a call: threads of the other process spin for a moment after their last loop
ENDING = 5.0  # seconds that the worker gets to end by itself

Settings = Mapping[str, Any]


class RunnerFailed(RuntimeError):
    """A commit's package does not import, or does not run a case."""


class Span(NamedTuple):
    """Start and end of a call, in seconds of the monotonic clock that all processes share."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Turns(NamedTuple):
    """Calls of one work: those of this commit, and those of the other one, each after its counterpart."""

    here: list[Span]
    there: list[Span]


def checkout(text: str) -> Path:
    """The folder of an `--against`.

    Raises:
        argparse.ArgumentTypeError: it is no checkout with a package nested_learning.
    """
    folder = Path(text).expanduser().resolve()
    package = (folder / "nested_learning" / "__init__.py").is_file()
    if not package or Path(_git(folder, "rev-parse", "--show-toplevel") or "/").resolve() != folder:
        raise argparse.ArgumentTypeError(
            f"{text} is no checkout with a package nested_learning; "
            "make one with `git worktree add FOLDER COMMIT`"
        )
    return folder


def add_option(options: argparse.ArgumentParser) -> None:
    """The option that compares with another commit in place of the benchmark's own question."""
    options.add_argument(
        "--against",
        type=checkout,
        metavar="FOLDER",
        help="a checkout of another commit, to be timed in turn with this one: ratios of medians",
    )


def revision(folder: Path) -> str:
    """`git describe` of a checkout, "-dirty" if changed."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12")


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class Runner:
    """A process that runs a case with the package in `folder`; a context, at whose end the process ends.

    Attributes:
        works: names of the works that the package has.

    Raises:
        RunnerFailed: the package or the case does not run there.
    """

    def __init__(self, folder: Path, case: str, settings: Settings) -> None:
        arguments = [str(folder), case, json.dumps(settings), str(torch.get_num_threads())]
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.works: list[str] = self._answer()["works"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str) -> Span:
        """Run a work there, and wait for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps({"call": name}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        return Span(answer["start"], answer["end"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if "error" in answer:
            raise RunnerFailed(f"the package in {self.folder} does not run this case: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process: by itself, since its input ends, or else by force."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def in_turns(here: Runner, there: Runner, repeats: int, warmup: int = 1) -> dict[str, Turns]:
    """Calls of each work that both commits have: one here, one there, then of the next work.

    Args:
        here, there: processes of the two commits.
        repeats: calls that are kept, of each work on either side.
        warmup: calls before them.
    """
    turns = {name: Turns([], []) for name in here.works if name in there.works}
    for turn in range(warmup + repeats):
        for name, spans in turns.items():
            for runner, kept in zip((here, there), spans, strict=True):
                time.sleep(PAUSE)
                span = runner.call(name)
                if turn >= warmup:
                    kept.append(span)
    return turns


def compare(
    folder: Path, cases: Sequence[tuple[str, Settings]], repeats: int, warmup: int = 1
) -> dict[str, Any]:
    """Time cases here and with the package in `folder`, show the medians and their ratios, and return them.

    Args:
        folder: a checkout.
        cases: names in `benchmarks.cases.CASES`, each with its arguments, which JSON can say.
        repeats: timed calls of each work on either side.
        warmup: calls before them.

    Raises:
        RunnerFailed: a case does not run there.
    """
    own = Path(nested_learning.__file__).resolve().parents[1]
    refs = {"here": git_revision(), "there": revision(folder)}
    rows: list[dict[str, Any]] = []
    for case, settings in cases:
        with Runner(own, case, settings) as here, Runner(folder, case, settings) as there:
            turns = in_turns(here, there, repeats, warmup)
        only = sorted(set(here.works) ^ set(there.works))
        if only:
            print(f"only one of the two has: {'; '.join(only)}")
        rows += [_row(case, settings, name, found) for name, found in turns.items()]
    print(f"here: git {refs['here']}; there: git {refs['there']}, {folder}")
    show("medians; a ratio above 1: here is faster", rows)
    return {**refs, "folder": str(folder), "repeats": repeats, "rows": rows}


def _row(case: str, settings: Settings, name: str, turns: Turns) -> dict[str, Any]:
    here, there = (median(span.seconds for span in spans) for spans in turns)
    plain = [f"{key} {value}" for key, value in settings.items() if isinstance(value, (str, int))]
    return {
        "case": ", ".join([case, *plain]),
        "work": name,
        "here, ms": 1e3 * here,
        "there, ms": 1e3 * there,
        "ratio": there / here,
    }
