"""What became of transformers' tests, from the XML that pytest writes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

NOT_APPLICABLE = "not applicable: "


@dataclass
class Results:
    """Outcomes of a run.

    Attributes:
        passed: how many passed, by configuration.
        failed: (configuration, test, first line of the error) of each that did not.
        not_applicable: (test, reason) of those that cannot apply to Hope, to the number of configurations.
        skipped: reason of those that transformers skips by itself, to the tests.
    """

    passed: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    not_applicable: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def read_results(path: Path) -> Results:
    """The outcomes in a file of JUnit's XML, one entry per test and configuration.

    A test that fails in a subtest, or in its set-up, is there more than once and counts as one that failed.
    """
    results = Results()
    outcomes: dict[tuple[str, str], tuple[str, str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        key = (case.get("classname", "").rsplit(".", 1)[-1].removeprefix("Hope_"), case.get("name", ""))
        outcome = ("passed", "")
        for element in case:
            if element.tag in ("failure", "error", "skipped"):
                outcome = (element.tag, (element.get("message") or element.text or "").strip())
        if outcomes.get(key, ("passed", ""))[0] not in ("failure", "error"):
            outcomes[key] = outcome
    for (configuration, test), (kind, message) in outcomes.items():
        if kind == "passed":
            results.passed[configuration] += 1
        elif kind != "skipped":
            results.failed.append((configuration, test, message.split("\n", 1)[0]))
        elif NOT_APPLICABLE in message:
            results.not_applicable[test, message.split(NOT_APPLICABLE, 1)[1]] += 1
        else:
            results.skipped[re.sub(r"Hope\w+", "Hope…", message)][test] += 1
    return results


def render(results: Results, missing: dict[str, int]) -> str:
    """The report.

    Args:
        results: outcomes of a run.
        missing: files that were not there, with the number of tests that were not run for it.
    """
    lines = ["", "failed:"]
    lines += [f"  {configuration}: {test}: {error}" for configuration, test, error in sorted(results.failed)]
    lines += ["  none"] if not results.failed else []
    lines += ["not applicable to Hope (tests/conformance/table.py):"]
    lines += [f"  {count} × {test}: {why}" for (test, why), count in sorted(results.not_applicable.items())]
    lines += ["skipped by transformers itself:"]
    for reason, tests in sorted(results.skipped.items(), key=lambda item: -item[1].total()):
        names = ", ".join(sorted(tests))
        lines.append(f"  {tests.total()} × {reason} ({names})")
    lines += ["not run, because files of transformers' repository are missing (TRANSFORMERS=FOLDER):"]
    lines += [f"  {count} in {name}" for name, count in missing.items()] or ["  none"]
    failed = Counter(configuration for configuration, _, _ in results.failed)
    lines += ["", f"{'configuration':<24}{'passed':>8}{'failed':>8}"]
    for configuration in sorted(set(results.passed) | set(failed)):
        lines.append(f"{configuration:<24}{results.passed[configuration]:>8}{failed[configuration]:>8}")
    skipped = sum(tests.total() for tests in results.skipped.values())
    lines.append(
        f"{results.passed.total()} passed, {len(results.failed)} failed, {results.not_applicable.total()} not "
        f"applicable, {skipped} skipped by transformers, {sum(missing.values())} not run (files missing)"
    )
    return "\n".join(lines)
