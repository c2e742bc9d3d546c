"""One thread, since tensors are tiny here; and `--extras`, with which no package may be missing."""

from __future__ import annotations

import gc
import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest

# Also for the processes that tests start. Torch reads it when it is loaded, which not every test needs.
os.environ["OMP_NUM_THREADS"] = "1"

LOCK = Path(__file__).parents[1] / "requirements-extras.lock"
# Packages that are imported by another name than their distribution's.
IMPORTED_AS = {"sklearn": "scikit_learn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extras",
        action="store_true",
        help=f"the packages of {LOCK.name} are installed: a test that skips for lack of one of them fails",
    )


@cache
def distributions() -> frozenset[str]:
    """Distributions that the lock file pins, in lower case with underscores."""
    pins = re.findall(r"^([\w.-]+)==", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return frozenset(re.sub(r"[-_.]+", "_", name).lower() for name in pins)


class Kept:
    """Modules and tests: the garbage that each training run collects at its end is not looked for in them."""

    modules = 0

    @classmethod
    def freeze(cls) -> None:
        gc.collect()
        gc.freeze()
        cls.modules = len(sys.modules)


def pytest_collection_finish() -> None:
    Kept.freeze()


def pytest_runtest_setup() -> None:
    if len(sys.modules) >= Kept.modules + 100:  # loaded by a test that was the first to need them
        Kept.freeze()


def missing(report: pytest.CollectReport | pytest.TestReport) -> str | None:
    """The package of the lock file for lack of which `pytest.importorskip` skipped, if it did."""
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""
    found = re.search(r"could not import '(\w+)", reason) if report.skipped else None
    name = "" if found is None else IMPORTED_AS.get(found[1], found[1]).lower()
    return name if name in distributions() else None


def fail_if_missing(report, config: pytest.Config):
    """The report; with `--extras` a failure where it is a skip for lack of a package."""
    if config.getoption("extras") and (name := missing(report)) is not None:
        report.outcome = "failed"
        report.longrepr = (
            f"{report.longrepr[-1]}\n{name} is pinned in {LOCK.name}: install it, or leave out --extras"
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return fail_if_missing((yield), collector.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    return fail_if_missing((yield), item.config)
