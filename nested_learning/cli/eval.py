"""The command `nested-learning eval`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from nested_learning._checks import KeyTwice, each_key_once, shown
from nested_learning.cli.output import print_json, print_table, say
from nested_learning.cli.parsing import new_parser, parse

DESCRIPTION = """\
Answer the paper's questions: train or teach methods on tasks, tabulate, and judge the paper's claims.

TASK is one of those that `nested-learning eval --list` names, or `all`. Every finished run is kept in the
folder of --output, so that the same command goes on where it was interrupted or ran out of --max_minutes. It
writes there report.md, report.html (one page, no network), results.json, trials.jsonl and a plot per task.
--option TASK.NAME=VALUE (as JSON) replaces an option of the budget. --finished takes trials.jsonl files of
other folders or machines into one report. Both, --methods and --seeds may be repeated. Exit code 1: a run,
or a claim or plot of a task, failed; the report says which.

example:
  nested-learning eval all --budget smoke --output runs/smoke
  nested-learning eval recall formal --methods transformer hope --seeds 0 1 2 --output runs/eval --jobs 2
"""


def run(argv: list[str]) -> int:
    """Parse, evaluate, print. Returns the exit code."""
    values = parse(_parser(), argv)

    from nested_learning.evals.runner import EvalConfig, evaluate

    if values.list:
        _list(values.json)
        return 0
    if not values.tasks:
        raise ValueError("no task is named; `nested-learning eval --list` names all, `all` takes them all")
    config = EvalConfig(
        tasks=values.tasks,
        budget=values.budget,
        methods=values.methods,
        seeds=values.seeds,
        tuning_seeds=values.tuning_seeds,
        options=options(values.option),
        output=values.output,
        finished=values.finished,
        only_report=values.only_report,
        max_minutes=values.max_minutes,
        jobs=values.jobs,
    )
    command = shlex.join(["nested-learning", "eval", *argv])
    results = evaluate(config, say)
    from nested_learning.evals.report.build import contents
    from nested_learning.evals.report.write import write_report

    folder = None if config.output is None else Path(config.output)
    report = contents(results, command) if folder is None else write_report(results, command, folder)
    print_json(report) if values.json else _print(report, folder)
    return 1 if any(task["failed"] for task in report["tasks"]) else 0


def _parser() -> ArgumentParser:
    parser = new_parser("eval", "TASK ... ", DESCRIPTION)
    parser.add_argument("tasks", nargs="*", type=str, help="tasks, or all")
    parser.add_argument("--list", action="store_true", help="list tasks and methods, and do no more")
    parser.add_argument(
        "--budget", type=str, default="small", help="smoke, small (hours of two cores) or full (the papers')"
    )
    parser.add_argument(
        "--methods",
        "--models",
        nargs="+",
        type=str,
        action="extend",
        help="methods in place of each task's own",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, action="extend", help="seeds instead of as many as the task says"
    )
    parser.add_argument(
        "--tuning_seeds", type=int, help="other seeds, on which settings are chosen by the mean"
    )
    parser.add_argument(
        "--option", nargs="+", type=str, action="extend", default=[], help="TASK.NAME=VALUE, options of tasks"
    )
    parser.add_argument("--output", type=str, help="folder of finished runs and of the report")
    parser.add_argument(
        "--finished",
        nargs="+",
        type=str,
        action="extend",
        default=[],
        help="trials.jsonl of other folders",
    )
    parser.add_argument(
        "--only_report", action="store_true", help="make no run: report those that are finished"
    )
    parser.add_argument("--max_minutes", type=float, help="begin no run that would probably end later")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share runs and cores")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, alone on stdout")
    return parser


def options(given: list[str]) -> dict[str, dict[str, Any]]:
    """Options by task of TASK.NAME=VALUE; a VALUE that is no JSON is text.

    Raises:
        ValueError: another form, or two values of one option or of one key within its JSON.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        place, equals, value = text.partition("=")
        task, point, name = place.partition(".")
        if not (equals and point and task and name):
            raise ValueError(f"--option {text!r} has not the form TASK.NAME=VALUE, such as recall.steps=500")
        try:
            read = json.loads(value, object_pairs_hook=each_key_once)
        except KeyTwice as error:
            raise ValueError(f"--option {task}.{name}: {error}") from None
        except ValueError:
            read = value
        before = found.setdefault(task, {}).setdefault(name, read)
        if json.dumps(before) != json.dumps(read):  # 1 and true are two values
            raise ValueError(
                f"--option {task}.{name} is given as {shown(before)} and as {shown(read)}; expected one value"
            )
    return found


def _list(as_json: bool) -> None:
    """Print every task with its budgets' options, and every method."""
    import dataclasses

    from nested_learning.evals import known_methods, known_tasks

    tasks, methods = known_tasks(), known_methods()
    if as_json:
        described = {
            name: {
                "title": task.title,
                "budgets": {budget: dataclasses.asdict(o) for budget, o in task.budgets.items()},
            }
            for name, task in tasks.items()
        }
        print_json({"tasks": described, "methods": {name: each.describe() for name, each in methods.items()}})
        return
    width = 2 + max(map(len, [*tasks, *methods]))
    print("tasks")
    for name, task in tasks.items():
        print(f"  {name:<{width}}{task.title}")
    for kind in dict.fromkeys(each.kind for each in methods.values()):
        print(f"methods: {kind}")
        for name, each in methods.items():
            if each.kind == kind:
                print(f"  {name}")


def _print(report: dict[str, Any], folder: Path | None) -> None:
    from nested_learning.evals.report.build import cell, count

    for task in report["tasks"]:
        if task["skipped"]:
            print(f"{task['name']}: not run: {task['skipped']}\n")
            continue
        columns = [column["name"] for column in task["columns"]]
        rows = [
            (
                row["method"],
                len(row["seeds"]),
                count(row["parameters"]),
                *(cell(row["figures"][name]) for name in columns),
            )
            for row in task["rows"]
        ]
        print_table(f"{task['name']}: {task['title']}", ("method", "seeds", "parameters", *columns), rows)
        for method, devices in task["mixed"].items():
            print(f"runs of {method} were made on several devices: {devices}")
        if task["unfinished"]:
            print(f"{task['unfinished']} runs are still to be made")
        for each in task["failed"]:
            print(f"failed: {each['trial']}: {each['error']}")
        print()
    for each in report["verdicts"]:
        print(f"{each['verdict']}: {each['claim']} ({each['source']}): {each['because']}")
    if folder is not None:
        say(f"written: {folder / 'report.md'}, report.html, results.json")
