"""Contents of a report as plain values for the templates: verdicts, tables, notes, figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from nested_learning.evals.claims import UNTOLD, Verdict
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.runner import TaskResult
from nested_learning.evals.task import Task
from nested_learning.evals.trial import error_text
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, versions

NONE = "–"


def contents(results: Sequence[TaskResult], command: str, folder: Path | None = None) -> dict[str, Any]:
    """Everything that a report shows, fit for JSON.

    Args:
        results: of the tasks.
        command: that repeats the evaluation.
        folder: where plots are written, `TASK.png` each; None: there are none.
    """
    sections = [_section(result, folder) for result in results]
    return {
        "format": "nested_learning.evaluation",
        "version": 1,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "hardware": hardware(process_state().device),
        "made": _origins(results),
        "verdicts": [{"task": each["name"], **claim} for each in sections for claim in each["claims"]],
        "tasks": sections,
    }


def _origins(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Machines, versions and days that runs were made on, with their number, the most frequent first."""
    names = ("device_name", "nested_learning", "git", "torch", "python", "threads", "date")
    counted = Counter(
        tuple(outcome.made.get(name) for name in names) for result in results for outcome in result.outcomes
    )
    return [{**dict(zip(names, made, strict=True)), "runs": runs} for made, runs in counted.most_common()]


def origin(made: Mapping[str, Any]) -> str:
    """An origin of runs in words."""
    if made["date"] is None:
        return f"{made['runs']} runs, their origin not recorded"
    package = str(made["nested_learning"]) + (f" at {made['git']}" if made["git"] else "")
    return (
        f"{made['runs']} runs on {made['date']}, {made['device_name']}, {made['threads']} thread(s), "
        f"nested_learning {package}, torch {made['torch']}, Python {made['python']}"
    )


def _section(result: TaskResult, folder: Path | None) -> dict[str, Any]:
    task, rows = result.task, result.rows
    failed = [{"trial": str(each.trial), "error": each.error} for each in result.failed]
    failed += [{"trial": f"{task.name}, {what}", "error": error} for what, error in result.faults.items()]
    ran = any(row.figures for row in rows.values())
    # The number of parameters has a column of its own in every table.
    shown = {name for row in rows.values() for name in task.columns if row.values(name)} - {"parameters"}
    columns = {name: what for name, what in task.columns.items() if name in shown}
    section: dict[str, Any] = {
        "name": task.name,
        "title": task.title,
        "note": _attempt(failed, f"{task.name}, note", task.note, ""),
        "options": dict(vars(task.options)),
        "tuned_on": sorted({o.trial.seed for o in result.outcomes if o.trial.tuning}),
        "skipped": result.skipped,
        "left_out": list(result.left_out),
        "mixed": dict(result.mixed),
        "unfinished": result.unfinished,
        "seconds": round(result.seconds, 1),
        "failed": failed,
        "columns": [{"name": name, "what": what} for name, what in columns.items()],
        "printed": {name: dict(values) for name, values in task.printed().items()},
        "rows": [_row(row, list(columns)) for row in rows.values()],
        "common": _common(result),
        "claims": _claims(task, rows, failed) if ran else [],
        "figure": None,
    }
    if folder is not None and any(outcome.figures for outcome in result.outcomes):  # more than guesses
        path = folder / f"{task.name}.png"

        def draw() -> bool:
            task.plot(rows, path)
            return path.is_file()

        section["figure"] = path.name if _attempt(failed, f"{task.name}, plot", draw, False) else None
    return section


def _attempt(failed: list[dict[str, Any]], what: str, made: Callable[[], Any], otherwise: Any) -> Any:
    """What a task's own code gives, or `otherwise` and an entry of `failed`: a report has the other parts."""
    try:
        return made()
    except Exception as problem:
        failed.append({"trial": what, "error": error_text(problem)})
        return otherwise


def _row(row: MethodRow, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "method": row.method,
        "settings": dict(row.settings),
        "seeds": sorted(row.figures),
        "errors": {str(seed): error for seed, error in row.errors.items()},
        "parameters": row.mean("parameters"),
        "figures": {
            name: {
                "mean": row.mean(name),
                "spread": row.spread(name),
                "seeds": list(row.values(name).values()),
            }
            for name in columns
        },
    }


def _common(result: TaskResult) -> dict[str, Any] | None:
    """Means of the headline over the seeds that all rows have, where rows differ in theirs; else None.

    Other means do not compare then: a row of nothing but easy seeds looks ahead of one that has them all.
    """
    figure = result.task.headline
    ran = {outcome.trial.method.name for outcome in result.outcomes}  # constants have every seed
    rows = [row for name, row in result.rows.items() if name in ran]
    values = {row.method: found for row in rows if (found := row.values(figure))}
    if len({frozenset(found) for found in values.values()}) < 2:
        return None
    seeds = sorted(set.intersection(*map(set, values.values())))
    means = {name: fmean(found[seed] for seed in seeds) for name, found in values.items()} if seeds else {}
    return {"figure": figure, "seeds": seeds, "means": means}


def common(found: Mapping[str, Any]) -> str:
    """Sentence on the means that `_common` found."""
    if not found["seeds"]:
        return "Rows have different seeds, none in common: their means do not compare."
    means = ", ".join(f"{name} {number(mean)}" for name, mean in found["means"].items())
    seeds = ", ".join(map(str, found["seeds"]))
    return (
        f"Rows have different seeds, so that means over each row's own do not compare. Means of "
        f"{found['figure']} over those that all have ({seeds}): {means}."
    )


def _claims(
    task: Task[Any], rows: Mapping[str, MethodRow], failed: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """The claims of a task with their verdicts."""
    found = []
    for claim in _attempt(failed, f"{task.name}, claims", lambda: list(task.claims()), []):
        untold = Verdict(UNTOLD, "it could not be judged")
        verdict = _attempt(failed, f"{task.name}, claim {claim.text}", partial(claim.judge, rows), untold)
        found.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "verdict": verdict.verdict,
                "because": verdict.because,
            }
        )
    return found


def cell(figure: Mapping[str, Any]) -> str:
    """A mean and its standard deviation as a table has them."""
    if figure["mean"] is None:
        return NONE
    mean = number(figure["mean"])
    return mean if figure["spread"] is None else f"{mean} ± {number(figure['spread'], like=figure['mean'])}"


def number(value: float, like: float | None = None) -> str:
    """Three decimals, fewer for large numbers; `like`: with as many as that one has."""
    size = abs(value if like is None else like)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def count(parameters: float | None) -> str:
    """A number of parameters as a table has it."""
    return NONE if parameters is None else number(parameters)


def settings(values: Mapping[str, Any]) -> str:
    """Settings in a few words, long ones left out."""
    short = {name: value for name, value in values.items() if not isinstance(value, (list, dict))}
    return ", ".join(f"{name} {value}" for name, value in short.items())
