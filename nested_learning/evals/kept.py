"""Finished trials: those of a folder, a file each, and those of files of other evaluations, a line each."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nested_learning._checks import check_fields
from nested_learning._tensor_files import parse_json
from nested_learning.evals.rows import Figures, checked_figures
from nested_learning.evals.trial import Trial, TrialOutcome
from nested_learning.training.report import versions
from nested_learning.training.run_cache import RunCache

FOUND = ("figures", "seconds", "error", "made")  # names of a line that do not decide the trial
COUNTED = ("nested_learning", "torch", "transformers")  # packages whose version decides figures
DECIDING = ("task", "version", "options", "tuning", "method", "seed")  # the widest first, for reasons
DEVICES = ("cpu", "cuda", "mps", "xpu")
_MADE = dict[str, str | int | float | None]
_RESULT = {"figures": dict[str, Any], "seconds": float, "versions": dict[str, str | None], "made": _MADE}
_LINE = {
    "task": str,
    "version": int,
    "options": dict[str, Any],
    "method": dict[str, Any],
    "seed": int,
    "tuning": bool,
    "device": str,
    "figures": dict[str, Any] | None,
    "seconds": float,
    "error": Any,
    "made": _MADE,
}
_SHOWN = 4  # details of one reason


@dataclass(frozen=True, eq=False)  # each line is one of its own
class FinishedLine:
    """A line of a file trials.jsonl, as `TrialOutcome.line` has it.

    Attributes:
        path: path of the file.
        number: its place there, from 1.
        run: what it says.
    """

    path: Path
    number: int
    run: dict[str, Any]

    @property
    def failed(self) -> bool:
        """Whether the run ended by an error."""
        return self.run["error"] is not None or self.run["figures"] is None

    def __str__(self) -> str:
        return f"line {self.number} of {self.path}"


class _Kept(NamedTuple):
    """An outcome that was kept, the versions and the device that made it, and where it stands."""

    figures: Figures
    seconds: float
    made: Mapping[str, Any]
    versions: Mapping[str, Any]
    device: str
    place: str
    line: FinishedLine | None


class TrialCache:
    """Finished trials of a folder and of files.

    One that was made with other versions of this package, torch or transformers does not count, which is
    said; nor does what is damaged in the folder. Failed ones are not kept. Lines of files count whatever
    device they were made on, the own device before others.

    Args:
        folder: new ones are written there; None: nothing is kept.
        finished: files trials.jsonl that other evaluations wrote, on this machine or on others.
        only_report: no trial is made after: those in the folder count whatever their device.

    Raises:
        ValueError: a file of `finished` cannot be read, or a line of it is no trial.
    """

    def __init__(
        self, folder: Path | None, finished: Sequence[str | Path] = (), only_report: bool = False
    ) -> None:
        self.cache, self.only_report = RunCache(folder), only_report
        found = versions()
        self.versions = {name: found[name] for name in COUNTED}
        self.files = {path: read_lines(path) for path in dict.fromkeys(map(Path, finished))}
        self._given: dict[str, list[FinishedLine]] = defaultdict(list)
        for line in (line for lines in self.files.values() for line in lines if not line.failed):
            self._given[identity_of(line.run, device=False)].append(line)
        self._asked: list[dict[str, Any]] = []
        self._used: set[FinishedLine] = set()
        self._outdated: dict[str, list[str]] = defaultdict(list)
        self._differing: dict[str, str] = {}

    def find(self, trial: Trial) -> TrialOutcome | None:
        """The outcome that was kept, if it is of these versions; the folder's before that of a file.

        Raises:
            ValueError: the line of a file holds figures that the task cannot have.
        """
        key = json.loads(json.dumps(trial.key()))
        self._asked.append(key)
        kept = [*self._of_folder(trial, key), *self._of_files(trial, key)]
        fitting = [each for each in kept if self._of_these_versions(each.versions)]
        if not fitting:
            if kept:
                self._outdated[self._differences(kept[0].versions)].append(str(trial))
            return None
        chosen = next((each for each in fitting if each.device == key["device"]), fitting[0])
        for each in fitting:
            if each.device == chosen.device and _compared(trial, each) != _compared(trial, chosen):
                self._differing.setdefault(str(trial), f"{chosen.place} and {each.place}")
            elif each.line is not None and (each is chosen or each.device == chosen.device):
                self._used.add(each.line)
        return TrialOutcome(trial, chosen.figures, chosen.seconds, made=chosen.made, device=chosen.device)

    def _of_folder(self, trial: Trial, key: dict[str, Any]) -> Iterator[_Kept]:
        def check(result: Any) -> None:
            check_fields(result, _RESULT, optional=("made",))
            checked_figures(result["figures"], trial.task.shown())

        others = [name for name in DEVICES if name != key["device"]] if self.only_report else []
        for device in (key["device"], *others):
            own = {**key, "device": device}
            result = self.cache.find(own, check)
            if result is not None:
                found = (result["figures"], result["seconds"], result.get("made", {}), result["versions"])
                yield _Kept(*found, device, str(self.cache.path(own)), None)

    def _of_files(self, trial: Trial, key: dict[str, Any]) -> Iterator[_Kept]:
        for line in self._given.get(identity_of(key, device=False), ()):
            run = line.run
            try:
                figures = checked_figures(run["figures"], trial.task.shown())
            except ValueError as problem:
                raise _unfit(line, problem) from None
            yield _Kept(figures, run["seconds"], run["made"], run["made"], run["device"], str(line), line)

    def _of_these_versions(self, made_with: Mapping[str, Any]) -> bool:
        return not self._differences(made_with)

    def _differences(self, made_with: Mapping[str, Any]) -> str:
        """Packages of other versions in words; a build for another device (2.9.0+cpu) is none."""
        return "; ".join(
            f"{name} {made_with.get(name)}, here {here}"
            for name, here in self.versions.items()
            if str(made_with.get(name)).partition("+")[0] != str(here).partition("+")[0]
        )

    def keep(self, outcome: TrialOutcome) -> TrialOutcome:
        """Write an outcome with figures; a warning where something else has the name of its file."""
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
        except ValueError as problem:
            warnings.warn(f"{outcome.trial} is not kept: {problem}", RuntimeWarning, stacklevel=2)
        return outcome

    # -- what is to be said

    def warn_of_versions(self) -> None:
        """Say which outcomes do not count, because other versions made them, and what becomes of them."""
        then = "left out, as no run is made" if self.only_report else "made again"
        for differing, trials in self._outdated.items():
            warnings.warn(
                f"{len(trials)} runs (the first: {trials[0]}) were kept by {differing}: they are {then}",
                RuntimeWarning,
                stacklevel=3,
            )
        self._outdated.clear()

    def report_files(self, say: Callable[[str], None] | None) -> None:
        """Say of each file how many lines were used, and why others were not; and which runs stand twice.

        Args:
            say: takes each sentence; None: a warning for each file with lines that were not used.
        """
        if self._differing:
            trial, places = next(iter(self._differing.items()))
            warnings.warn(
                f"{len(self._differing)} runs have different figures in two places (the first: {trial}, in "
                f"{places}); those of the first place are taken. Leave one of the files out",
                RuntimeWarning,
                stacklevel=3,
            )
        for path, lines in self.files.items():
            rest = [line for line in lines if line not in self._used]
            text = f"{path}: {len(lines) - len(rest)} of {len(lines)} runs are used"
            text += f"; the others are {self._reasons(rest)}" if rest else ""
            if say is not None:
                say(text)
            elif rest:
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _reasons(self, lines: Sequence[FinishedLine]) -> str:
        """Reasons for which lines were not used, each with the number of lines."""
        found: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            reason, detail = self._reason(line)
            found[reason].append(detail)
        return "; ".join(f"{len(each)} {reason}{_listed(each)}" for reason, each in found.items())

    def _reason(self, line: FinishedLine) -> tuple[str, str]:
        """Why a line was not used, and of which value that is true."""
        run, asked = line.run, self._asked
        if line.failed:
            return "failed ones", ""
        for name in DECIDING:
            alike = [key for key in asked if key[name] == run[name]]
            if not alike:
                return _difference(name, run, asked)
            asked = alike
        if differing := self._differences(run["made"]):
            return "of other versions", differing
        return "replaced by another of the same trial", ""


def _difference(name: str, run: Mapping[str, Any], asked: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """In what a run differs from all that were asked for and are like it up to the name, and its value."""
    here = asked[0][name] if asked else None
    if name == "version":
        return "of another version of the task", f"{run['version']}, here {here}"
    if name == "options" and isinstance(here, dict):
        own = run["options"]
        names = [each for each in {**own, **here} if own.get(each) != here.get(each)]
        return "of other options", "; ".join(f"{n} {own.get(n)!r}, here {here.get(n)!r}" for n in names)
    if name == "tuning":
        return ("of tuning, which is not asked for" if run["tuning"] else "of settings yet to be chosen"), ""
    if name == "method":
        method = str(run["method"].get("name"))
        if any(key["method"].get("name") == method for key in asked):
            return "of other settings of a method", method
        return "of methods that are not asked for", method
    return f"of {name}s that are not asked for", str(run[name])


def _listed(details: Sequence[str]) -> str:
    distinct = [each for each in dict.fromkeys(details) if each]
    more = ", …" if len(distinct) > _SHOWN else ""
    return f" ({', '.join(distinct[:_SHOWN])}{more})" if distinct else ""


def _compared(trial: Trial, kept: _Kept) -> dict[str, Any]:
    """Figures that two runs of a trial have in common; seconds they have not."""
    return {name: kept.figures.get(name) for name in trial.task.shown() if "second" not in name}


def read_lines(path: Path) -> list[FinishedLine]:
    """The lines of a file trials.jsonl; blank ones are passed over.

    Raises:
        ValueError: the file cannot be read, or a line is no trial; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a trials.jsonl that `nested-learning eval` wrote"
        ) from None
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        line = FinishedLine(path, number, {})
        try:
            run = parse_json(text)
            if not isinstance(run, dict) or run.get("what") != "trial":
                raise ValueError("it is no trial")
            check_fields(run, _LINE, optional=("made",))
        except ValueError as problem:
            raise _unfit(line, problem) from None
        found.append(FinishedLine(path, number, {"made": {}, **run}))
    return found


def _unfit(line: FinishedLine, problem: ValueError) -> ValueError:
    return ValueError(
        f"{line} is not fit: {problem}; expected a line of a trials.jsonl that `nested-learning eval` wrote"
    )


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """The runs of a file trials.jsonl without those that failed.

    Raises:
        ValueError: as `read_lines`.
    """
    return [line.run for line in read_lines(path) if not line.failed]


def identity_of(line: Mapping[str, Any], device: bool = True) -> str:
    """Text of all that decides a trial, from its key or its line; equal where their JSON is.

    Args:
        line: the key or the line.
        device: whether the device counts.
    """
    left_out = FOUND if device else (*FOUND, "device")
    return json.dumps({name: line[name] for name in line if name not in left_out}, sort_keys=True)
