"""Verdicts on the paper's claims, from the evaluation's runs that the repository keeps.

python -m website.claims              write docs/evaluations/report.html and the tables in docs/results.md
python -m website.claims FILE ...     the same, with runs of other trials.jsonl files taken over before

No run is made: docs/evaluations/trials.jsonl has a line for each one that was, with its figures, its machine
and its day. A run that stands there already is not replaced.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_learning._files import write_text
from nested_learning.evals import find_task, known_tasks
from nested_learning.evals.kept import finished_lines, identity_of
from nested_learning.evals.report.write import markdown_cells, write_report
from nested_learning.evals.runner import EvalConfig, TaskResult, evaluate
from website.tables import TABLES

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evaluations" / "trials.jsonl"
PAGE = ROOT / "docs" / "evaluations" / "report.html"
RESULTS = ROOT / "docs" / "results.md"
NUMBER = re.compile(r"\((\d+)\) ")


def kept_options() -> dict[str, dict[str, Any]]:
    """Options of the tasks that have a run, by name, in the order of `eval --list`.

    Among them on how many seeds settings were chosen, where that is not what the budget says.

    Raises:
        ValueError: runs of one task have different options.
    """
    found: dict[str, dict[str, Any]] = {}
    tuned: dict[str, set[int]] = {}
    for run in finished_lines(KEPT):
        if found.setdefault(run["task"], run["options"]) != run["options"]:
            raise ValueError(
                f"{KEPT} has runs of {run['task']} with the options {found[run['task']]} and "
                f"{run['options']}; expected one set, so take the others out"
            )
        if run["tuning"]:
            tuned.setdefault(run["task"], set()).add(run["seed"])
    for name, seeds in tuned.items():
        if len(seeds) != len(find_task(name).at("small").tuning_seeds()):
            found[name] = {**found[name], "tuning_seeds": len(seeds)}
    return {name: found[name] for name in known_tasks() if name in found}


def command() -> str:
    """The command that makes the report of the kept runs."""
    options = kept_options()
    counts = {name: each["tuning_seeds"] for name, each in options.items() if "tuning_seeds" in each}
    words = ["nested-learning eval", *options, "--finished", KEPT.relative_to(ROOT).as_posix()]
    words += [f"--option {name}.tuning_seeds={count}" for name, count in counts.items()]
    return " ".join([*words, "--only_report --output runs/report"])


def results() -> list[TaskResult]:
    """Rows of the kept runs."""
    options = kept_options()
    return evaluate(EvalConfig(tasks=list(options), options=options, finished=[str(KEPT)], only_report=True))


def table(found: Sequence[TaskResult]) -> str:
    """Markdown table of the numbered claims, by number: verdict, task, and the figures that it rests on."""
    lines = []
    for result in found:
        for claim in result.task.claims():
            if (match := NUMBER.match(claim.text)) is None:
                continue
            verdict = claim.judge(result.rows)
            cells = (
                match[1],
                claim.text[match.end() :],
                claim.source,
                f"**{verdict.verdict}**",
                f"`{result.task.name}`",
                verdict.because,
            )
            lines.append((int(match[1]), markdown_cells(cells)))
    head = "| | claim | source | verdict | task | because |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{line}\n" for _, line in sorted(lines, key=lambda numbered: numbered[0]))


def take_over(paths: Sequence[Path]) -> int:
    """Add runs of other files to the kept ones, failed ones left out. Returns how many were new."""
    kept = finished_lines(KEPT) if KEPT.is_file() else []
    runs = {identity_of(line): line for line in kept}
    for path in paths:
        for line in finished_lines(path):
            runs.setdefault(identity_of(line), line)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    write_text(KEPT, "".join(f"{json.dumps(line)}\n" for line in runs.values()))
    return len(runs) - len(kept)


def blocks(found: Sequence[TaskResult]) -> dict[str, str]:
    """What docs/results.md says of the kept runs, by the name of the block: claims, and each table."""
    rows = {result.task.name: result.rows for result in found}
    return {"claims": table(found), **{each.name: each.text(rows.get(each.task, {})) for each in TABLES}}


def markers(block: str) -> tuple[str, str]:
    """The lines of docs/results.md between which a block stands."""
    return f"<!-- {block}: written by python -m website.claims -->\n", f"<!-- end of {block} -->\n"


def parts(text: str, block: str) -> tuple[str, str, str]:
    """The text before a block with its marker, the block, and the text from its end on.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = markers(block)
    before, found, rest = text.partition(begin)
    inside, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{RESULTS} has no lines {begin.strip()!r} and {end.strip()!r} to write between")
    return before + begin, inside, end + after


def write() -> None:
    """Write the page and the tables from the kept runs."""
    found = results()
    with tempfile.TemporaryDirectory() as folder:
        write_report(found, command(), Path(folder))
        write_text(PAGE, (Path(folder) / PAGE.name).read_text(encoding="utf-8"))
    text = RESULTS.read_text(encoding="utf-8")
    for name, block in blocks(found).items():
        before, _, after = parts(text, name)
        text = before + block + after
    write_text(RESULTS, text)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(f"{take_over([Path(each) for each in sys.argv[1:]])} runs taken over into {KEPT}")
    write()
