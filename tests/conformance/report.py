"""What became of transformers' tests, from the XML that pytest writes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.conformance.table import OUTDATED

NOT_APPLICABLE = "not applicable: "
NOT_RUN = "not run: a file is missing"
_RANKS = ("skipped", "passed", "failure", "error")


@dataclass
class Results:
    """Outcomes of a run.

    Attributes:
        passed: how many passed, by configuration.
        failed: (configuration, test, first line of the error) of each that did not.
        not_applicable: (test, reason) of those that cannot apply to Hope, to the number of configurations.
        skipped: reason of those that transformers skips by itself, to the tests.
        outdated: (test, reason) of those that a file of another version calls wrongly, to the configurations.
    """

    passed: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    not_applicable: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    outdated: Counter[tuple[str, str]] = field(default_factory=Counter)


def read_results(paths: Iterable[Path]) -> Results:
    """The outcomes in files of JUnit's XML, one entry per test and configuration.

    A test with subtests is there more than once, and counts as failed where one of them failed, as skipped
    where all of it was skipped.
    """
    results = Results()
    outcomes: dict[tuple[str, str], tuple[str, str]] = {}
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        key = (case.get("classname", "").rsplit(".", 1)[-1].removeprefix("Hope_"), case.get("name", ""))
        outcome = ("passed", "")
        for element in case:
            if element.tag in ("failure", "error", "skipped"):
                outcome = (element.tag, (element.get("message") or element.text or "").strip())
        if key not in outcomes or _RANKS.index(outcome[0]) > _RANKS.index(outcomes[key][0]):
            outcomes[key] = outcome
    base = _without_parameters({test for _, test in outcomes})
    for (configuration, test), (kind, message) in outcomes.items():
        old = [reason for text, reason in OUTDATED.items() if text in message]
        if kind == "passed":
            results.passed[configuration] += 1
        elif kind != "skipped" and old:
            results.outdated[test, old[0]] += 1
        elif kind != "skipped":
            results.failed.append((configuration, test, message.split("\n", 1)[0]))
        elif NOT_APPLICABLE in message:
            results.not_applicable[base(test), message.split(NOT_APPLICABLE, 1)[1]] += 1
        elif NOT_RUN not in message:
            results.skipped[_reason(message)][base(test)] += 1
    return results


def _without_parameters(tests: set[str]) -> Callable[[str], str]:
    """A function from a test's name to the one before `parameterized` appended its number and values."""
    firsts = [re.match(r"(.+?)_00?(_|$)", test) for test in tests]
    bases = {first[1] for first in firsts if first}

    def base(test: str) -> str:
        found = [name for name in bases if re.match(rf"{name}_\d+(_|$)", test)]
        return max(found, key=len, default=test)

    return base


def _reason(message: str) -> str:
    """A reason without what differs from model to model and from task to task."""
    message = re.sub(r"^.*? is skipped: `[\w-]+`", "the task", message)
    message = re.sub(r"<class '[\w.]*\.(Hope\w+)'>", r"\1", message)
    return re.sub(r"Hope\w+", "Hope", message)


def render(results: Results, missing: dict[str, int]) -> str:
    """The report.

    Args:
        results: outcomes of a run.
        missing: files that were not there, with the number of tests that were not run for it.
    """

    def each(rows: Counter[tuple[str, str]]) -> list[str]:
        return [f"  {count} × {test}: {why}" for (test, why), count in sorted(rows.items())] or ["  none"]

    failed = [f"  {where}: {test}: {error}" for where, test, error in sorted(results.failed)]
    lines = ["", "failed:", *(failed or ["  none"])]
    lines += ["not applicable to Hope (tests/conformance/table.py):", *each(results.not_applicable)]
    lines += ["skipped by transformers itself:"]
    for reason, tests in sorted(results.skipped.items(), key=lambda item: -item[1].total()):
        lines.append(f"  {tests.total()} × {reason} ({', '.join(sorted(tests))})")
    lines += ["not run, because the given files are of another version than the installed transformers:"]
    lines += each(results.outdated)
    lines += ["not run, because files of transformers' repository are missing (TRANSFORMERS=FOLDER):"]
    lines += [f"  {count} in {name}" for name, count in missing.items() if count] or ["  none"]
    by_configuration = Counter(configuration for configuration, _, _ in results.failed)
    lines += ["", f"{'configuration':<24}{'passed':>8}{'failed':>8}"]
    for name in sorted(set(results.passed) | set(by_configuration)):
        lines.append(f"{name:<24}{results.passed[name]:>8}{by_configuration[name]:>8}")
    skipped = sum(tests.total() for tests in results.skipped.values())
    not_run = sum(missing.values()) + results.outdated.total()
    lines.append(
        f"{results.passed.total()} passed, {len(results.failed)} failed, "
        f"{results.not_applicable.total()} not applicable, {skipped} skipped by transformers, "
        f"{not_run} not run (files missing or of another version)"
    )
    return "\n".join(lines)
