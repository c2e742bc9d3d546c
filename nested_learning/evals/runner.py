"""The trials of an evaluation, one after the other or in several processes, resumable to the single one."""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nested_learning._checks import require, require_folder_name
from nested_learning._errors import unknown
from nested_learning._files import make_folder
from nested_learning._progress import Progress, progress
from nested_learning._workers import at_work, interrupts_held, usable_cores
from nested_learning.evals.kept import TrialCache
from nested_learning.evals.method import Method
from nested_learning.evals.registry import find_task, known_methods, known_tasks
from nested_learning.evals.rows import MethodRow, checked_figures
from nested_learning.evals.task import BUDGETS, Task
from nested_learning.evals.trial import Trial, TrialOutcome, error_text, start_worker

ALL = "all"
PER_CORE = 4  # processes at most: more share the cores no better, and each takes memory of its own
SEEDS = 3  # where the options of a task do not say how many


@dataclass(kw_only=True)
class EvalConfig:
    """The tasks and methods of an evaluation.

    Args:
        tasks: names of tasks; "all": every one
        budget: smoke: seconds a task, to see that it works; small: hours of two cores; full: the protocols
            of the papers
        methods: names of methods, registered or of the tasks' tables; None: those of each task's table
        seeds: reported seeds; None: as many as each task's options say, from 0
        tuning_seeds: seeds from 1000 on, none of them reported, on which a method's settings are chosen by
            the mean; None: as many as each task's options say. A task whose options have no such field, as
            it chooses on documents or streams of its own, is left as it is
        options: options by task that replace those of the budget
        output: folder of finished trials and of the report; None: nothing is written
        finished: files trials.jsonl of other evaluations, whose trials are not made again
        only_report: no trial is made, so that no data is needed (rows such as chance are left out where it
            is missing); methods of which no trial is finished are left out
        max_minutes: no trial is begun that would probably end later; run the same command again to go on
        jobs: processes that share the trials, and the cores; at most four for each of these
    """

    tasks: list[str]
    budget: str = "small"
    methods: list[str] | None = None
    seeds: list[int] | None = None
    tuning_seeds: int | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: str | None = None
    finished: list[str] = field(default_factory=list)
    only_report: bool = False
    max_minutes: float | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise unknown("budget", self.budget, BUDGETS)
        _check_tasks(self.tasks)
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            distinct = values is None or len(set(values)) == len(values) > 0
            require(distinct, name, values, "one or more, all different")
        whole = all(0 <= seed < 2**32 for seed in self.seeds or ())
        require(whole, "seeds", self.seeds, "whole numbers from 0 to 2**32 - 1")
        require_folder_name("output", self.output)
        require(self.jobs >= 1, "jobs", self.jobs, "a whole number of at least 1")
        minutes = self.max_minutes
        require(minutes is None or minutes > 0, "max_minutes", minutes, "minutes, more than 0")
        for name in self.options:
            find_task(name)


def _check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError unless there are tasks, all different, or `all` alone."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(
            f"the tasks are {', '.join(names) or 'none'}; expected one or more names, all different"
            + (f", so name {', '.join(twice)} once" if twice else "")
        )
    if ALL in names and len(names) > 1:
        raise ValueError(
            f"the tasks are {', '.join(names)}; `{ALL}` stands alone, as it takes every task: "
            f"leave it out, or the other names"
        )


@dataclass
class TaskResult:
    """Rows of a task, and what is to be known about them.

    Attributes:
        task: at its options.
        rows: by method, with those that need no run; in the order of the table.
        skipped: why nothing was run, or None.
        unfinished: trials for which there was no time.
        failed: outcomes with an error.
        outcomes: of all trials that ended, also those that were kept.
        left_out: methods without a row, because none of their runs has ended.
        mixed: devices with their seeds, in words, by method whose row has runs of several devices.
        faults: errors of the task's own code beside its runs, by what it was asked for.
    """

    task: Task[Any]
    rows: dict[str, MethodRow] = field(default_factory=dict)
    skipped: str | None = None
    unfinished: int = 0
    failed: list[TrialOutcome] = field(default_factory=list)
    outcomes: list[TrialOutcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    mixed: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of all trials that ended."""
        return sum(outcome.seconds for outcome in self.outcomes)


@dataclass
class _Entrant:
    """A method on a task.

    Attributes:
        tuning: for each of its settings a trial on each of the tuning seeds.
        best: the method at the setting that is chosen; None where it is not known.
    """

    tuning: list[list[Trial]]
    best: Method | None = None

    def reported(self, seeds: Sequence[int]) -> dict[int, Trial]:
        """The trial of each seed; none where no setting is chosen."""
        return {} if self.best is None else {s: Trial(self.tuning[0][0].task, self.best, s) for s in seeds}


@dataclass
class _Plan:
    """A task with its methods, by name, and seeds; what this machine lacks for it, and why it is not run."""

    task: Task[Any]
    entrants: dict[str, _Entrant]
    seeds: list[int]
    missing: str | None = None
    skipped: str | None = None


def evaluate(config: EvalConfig, say: Callable[[str], None] | None = None) -> list[TaskResult]:
    """Run what is not kept from before, tuning first.

    Args:
        config: tasks, methods and limits.
        say: takes a sentence on each file of `finished`; None: a warning for those not used as a whole.

    Returns:
        The result of each task, in the order of the configuration.

    Raises:
        ValueError: an unknown task, method or option, a method that no chosen task takes, or a file of
            `finished` that cannot be read or is damaged.
        OSError: the folder cannot be written.
    """
    plans = plan(config)
    folder = None if config.output is None else Path(config.output) / "trials"
    if folder is not None:
        make_folder(folder.parent)  # what cannot be written is said before the first trial
        if config.only_report:
            folder.mkdir(exist_ok=True)
        else:
            make_folder(folder)
    entrants = [(p, entrant) for p in plans for entrant in p.entrants.values()]
    tried = [trial for _, entrant in entrants if len(entrant.tuning) > 1 for trial in chain(*entrant.tuning)]
    later = sum(len(p.seeds) for p, _ in entrants)
    with progress("evaluating", len(tried) + later, "run") as bar, ExitStack() as held:
        kept = TrialCache(folder, config.finished, config.only_report)
        crew = _Crew(config, kept, bar, held)
        tuned = crew.run(tried, later)
        for _, entrant in entrants:
            tuning = entrant.tuning
            entrant.best = tuning[0][0].method if len(tuning) == 1 else _best(tuning, tuned)
        reported = [trial for p, entrant in entrants for trial in entrant.reported(p.seeds).values()]
        outcomes = crew.run(reported, 0)
    kept.report_files(say)
    results = [_result(p, {**tuned, **outcomes}) for p in plans]
    if config.only_report:
        for result in results:
            _leave_out(result)
    return results


def plan(config: EvalConfig) -> list[_Plan]:
    """Methods and seeds of each task; ValueError as `evaluate`."""
    names = list(known_tasks()) if config.tasks == [ALL] else config.tasks
    found = [find_task(name) for name in names]
    for name in config.options:
        if name not in names:
            raise ValueError(
                f"options of {name!r} are given, which is not among the tasks {', '.join(names)}"
            )
    options = _options(config, found)
    tasks = [cls.at(config.budget, **options[cls.name]) for cls in found]
    asked = None if config.methods is None else _asked(config.methods, tasks)
    plans = []
    refusals: dict[str, list[str]] = {}
    for place, task in enumerate(tasks):
        own = task.tabled() if config.only_report else task.methods()
        _check_methods(task, own)
        chosen = list(own) if asked is None else asked[place]
        refused = {
            method.name: task.accepts(method)
            for method in (chosen if asked is not None else ())
            if not (config.only_report and task.lacking(method))  # what is finished needs no package
        }
        for name, reason in refused.items():
            if reason is not None:
                refusals.setdefault(name, []).append(reason)
        chosen = [method for method in chosen if refused.get(method.name) is None]
        seeds = (
            list(range(getattr(task.options, "seeds", SEEDS))) if config.seeds is None else list(config.seeds)
        )
        if choosing := sorted(set(seeds) & set(task.tuning_seeds())):
            raise ValueError(
                f"seed {choosing[0]} chooses settings of {task.name}; expected others in --seeds"
            )
        missing = task.missing()
        skipped = None if config.only_report else missing  # a report of what is finished needs no data
        none = "it has no methods" if asked is None else "none of the methods that were asked for is for it"
        skipped = skipped or (None if chosen else none)
        entrants = {method.name: _entrant(task, method) for method in ([] if skipped else chosen)}
        plans.append(_Plan(task, entrants, seeds, missing, skipped))
    for reasons in refusals.values():
        if len(reasons) == len(plans):
            raise ValueError(f"no task takes the method: {reasons[0]}")
    return plans


def _options(config: EvalConfig, tasks: Sequence[type[Task[Any]]]) -> dict[str, dict[str, Any]]:
    """Options of each task that replace those of the budget, the number of tuning seeds among them.

    Raises:
        ValueError: none of the tasks takes that number, or one is given two.
    """
    found = {cls.name: dict(config.options.get(cls.name, {})) for cls in tasks}
    count = config.tuning_seeds
    if count is None:
        return found
    takes = [cls.name for cls in tasks if hasattr(cls.budgets[config.budget], "tuning_seeds")]
    if not takes:
        raise ValueError(
            f"tuning_seeds is {count}, and {', '.join(found)} choose settings on no number of seeds; "
            "leave --tuning_seeds out"
        )
    for name in takes:
        if found[name].setdefault("tuning_seeds", count) != count:
            own = found[name]["tuning_seeds"]
            raise ValueError(
                f"tuning_seeds is {count}, and --option {name}.tuning_seeds={own}; expected one of the two"
            )
    return found


def _check_methods(task: Task[Any], methods: Sequence[Method]) -> None:
    """Raise ValueError for methods of one name, of which one row alone would be left."""
    names = [method.name for method in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{task.name} has several methods named {', '.join(twice)}; expected one of each name"
        )


def _entrant(task: Task[Any], method: Method) -> _Entrant:
    """A method with trials for each of its settings."""
    settings = task.grid(method)
    if not settings:
        raise ValueError(
            f"the grid of {task.name} has no setting for {method.name}; expected one or more, [{{}}] where "
            "nothing is to be tuned"
        )
    return _Entrant(
        [[Trial(task, method.at(each), seed, True) for seed in task.tuning_seeds()] for each in settings]
    )


def _asked(names: Sequence[str], tasks: Sequence[Task[Any]]) -> list[list[Method]]:
    """For each task the methods of these names: registered ones, its own, or those of another of the tasks.

    Raises:
        ValueError: there is none of a name.
    """
    known = known_methods()
    own = [{method.name: method for method in task.methods()} for task in tasks]
    anyones = {name: method for each in reversed(own) for name, method in each.items()}
    for name in names:
        if name not in known and name not in anyones:
            raise unknown("method", name, {*known, *anyones})
    return [[{**anyones, **each, **known}[name] for name in names] for each in own]


class _Crew:
    """Runs trials, in this process or in several, which `held` ends with itself."""

    def __init__(self, config: EvalConfig, kept: TrialCache, bar: Progress, held: ExitStack) -> None:
        self.kept, self.bar, self.cores = kept, bar, usable_cores()
        self.jobs = _useful(config.jobs, self.cores)
        minutes = -math.inf if config.only_report else config.max_minutes
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.seconds: dict[tuple[str, str], list[float]] = {}  # of trials, by task and method
        self._held = held

    def run(self, trials: Sequence[Trial], later: int) -> dict[str, TrialOutcome | None]:
        """The outcome of each trial by its identity, None for one without time; `later` more are to come."""
        found: dict[str, TrialOutcome | None] = {}
        waiting = []
        for trial in trials:
            kept = self.kept.find(trial)
            if kept is None:
                waiting.append(trial)
            else:
                found[identity(trial)] = self._note(kept)
        self.kept.warn_of_versions()
        self.bar.total = self.bar.done + len(waiting) + later
        for trial, outcome in self._outcomes(waiting):
            found[identity(trial)] = None if outcome is None else self._note(self.kept.keep(outcome))
            self.bar.advance()
        return found

    def _outcomes(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, TrialOutcome | None]]:
        if self.jobs == 1 or len(trials) < 2:
            for trial in trials:
                self.bar.note = str(trial)
                yield trial, trial.run() if self._in_time(trial) else None
            return
        queue, running = list(trials), dict[Future[TrialOutcome], Trial]()
        while queue or running:
            while queue and len(running) < self.jobs:
                trial = queue.pop(0)
                if self._in_time(trial):
                    self.bar.note = str(trial)
                    running[self._submit(trial)] = trial
                else:
                    yield trial, None
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                trial = running.pop(future)
                yield trial, _outcome(trial, future)

    def _submit(self, trial: Trial) -> Future[TrialOutcome]:
        with interrupts_held():
            try:
                return self._pool.submit(trial.run)
            except BrokenProcessPool:  # one of them was killed
                del self._pool
                return self._pool.submit(trial.run)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        """The processes, for tuning and for what is reported: each takes seconds to load torch."""
        context = multiprocessing.get_context("spawn")  # a fork would take over threads that hold locks
        threads = max(1, self.cores // self.jobs)
        return self._held.enter_context(
            at_work(ProcessPoolExecutor(self.jobs, context, start_worker, (threads,)))
        )

    def _in_time(self, trial: Trial) -> bool:
        """Whether a trial would probably end before the deadline."""
        if self.deadline is None:
            return True
        key = (trial.task.name, trial.method.name)
        same_task = (each for (task, _), each in self.seconds.items() if task == trial.task.name)
        known = self.seconds.get(key) or [seconds for each in same_task for seconds in each]
        return time.monotonic() + (median(known) if known else 0.0) <= self.deadline

    def _note(self, outcome: TrialOutcome) -> TrialOutcome:
        key = (outcome.trial.task.name, outcome.trial.method.name)
        self.seconds.setdefault(key, []).append(outcome.seconds)
        return outcome


def _useful(jobs: int, cores: int) -> int:
    """As many processes as asked for, at most a few per core: each takes the memory of torch and of a run."""
    most = PER_CORE * cores
    if jobs > most:
        warnings.warn(
            f"jobs is {jobs}, and this process may use {cores} cores: {most} processes are started, "
            f"{PER_CORE} per core. Set --jobs to at most {most}, best to {cores}",
            RuntimeWarning,
            stacklevel=4,
        )
    return min(jobs, most)


def identity(trial: Trial) -> str:
    """Text that tells a trial from others of the same evaluation."""
    return repr((trial.task.name, trial.method, trial.seed, trial.tuning))


def _outcome(trial: Trial, future: Future[TrialOutcome]) -> TrialOutcome:
    """What a process gave, or its end as an error."""
    problem = future.exception()
    if problem is None:
        return future.result()
    return TrialOutcome(trial, None, 0.0, f"its process ended: {type(problem).__name__}: {problem}")


def _best(tuning: Sequence[Sequence[Trial]], outcomes: Mapping[str, TrialOutcome | None]) -> Method | None:
    """The method at the setting with the best mean headline; a setting that failed at a seed is out.

    None where a trial is still to come, or each setting failed at some seed.
    """
    task = tuning[0][0].task
    scores: list[tuple[float, Method]] = []
    for trials in tuning:
        found = [outcomes[identity(trial)] for trial in trials]
        if None in found:
            return None
        figures = [each.figures.get(task.headline) for each in found if each and each.figures]
        values = [float(each) for each in figures if each is not None]
        if len(values) == len(trials):
            mean = fmean(values)
            scores.append((mean if task.higher_is_better else -mean, trials[0].method))
    return max(scores, key=lambda scored: scored[0])[1] if scores else None


def _leave_out(result: TaskResult) -> None:
    """Move the rows of methods of which no run has ended to `left_out`."""
    for name in [name for name, row in result.rows.items() if not row.figures and not row.errors]:
        del result.rows[name]
        result.left_out.append(name)


def _devices(by_seed: Mapping[int, TrialOutcome | None]) -> str:
    """The devices of a row and their seeds in words; empty unless there are several."""
    seeds: dict[str, list[int]] = {}
    for seed, outcome in by_seed.items():
        if outcome is not None and outcome.figures is not None and outcome.device is not None:
            seeds.setdefault(outcome.device, []).append(seed)
    words = [f"{device} (seeds {', '.join(map(str, each))})" for device, each in sorted(seeds.items())]
    return ", ".join(words) if len(words) > 1 else ""


def _result(p: _Plan, outcomes: Mapping[str, TrialOutcome | None]) -> TaskResult:
    """Rows of a plan."""
    result = TaskResult(p.task, skipped=p.skipped)
    if p.skipped:
        return result
    for name, entrant in p.entrants.items():
        tuning = [identity(trial) for trial in chain(*entrant.tuning)]
        own = [outcomes[each] for each in tuning if each in outcomes]
        by_seed = {seed: outcomes[identity(trial)] for seed, trial in entrant.reported(p.seeds).items()}
        result.unfinished += [*own, *by_seed.values()].count(None)
        if entrant.best is None and None in own:
            result.unfinished += len(p.seeds)
        ended = [outcome for outcome in [*own, *by_seed.values()] if outcome is not None]
        result.failed += [outcome for outcome in ended if outcome.error is not None]
        result.outcomes += ended
        result.rows[name] = MethodRow(
            name,
            {} if entrant.best is None else entrant.best.settings,
            {s: o.figures for s, o in by_seed.items() if o is not None and o.figures is not None},
            {s: o.error for s, o in by_seed.items() if o is not None and o.error is not None},
        )
        if words := _devices(by_seed):
            result.mixed[name] = words
    if not p.missing:
        try:
            result.rows |= _constants(p, result.rows)
        except Exception as problem:  # the runs are made, and stay in the report
            result.faults["constants"] = error_text(problem)
    return result


def _constants(p: _Plan, rows: Mapping[str, MethodRow]) -> dict[str, MethodRow]:
    """Rows that need no run. ValueError for figures that are none, and where a method has the name."""
    found = {}
    for name, figures in p.task.constants().items():
        if name in rows:
            raise ValueError(f"{name!r} is the name of a method too; expected rows with names of their own")
        same = checked_figures(figures, p.task.shown())
        found[name] = MethodRow(name, {}, dict.fromkeys(p.seeds, same))
    return found
