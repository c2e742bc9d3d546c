"""Run transformers' common tests on Hope and report.

    python -m tests.conformance [--transformers FOLDER] [--cache FOLDER] [--select EXPRESSION]

The exit code is 1 where a test failed, 2 where the tests could not be run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import transformers

from tests.conformance.layout import fetch_archive, fetch_packages, lay_out
from tests.conformance.report import read_results, render
from tests.conformance.table import CONFIGURATIONS

ROOT = Path(__file__).parents[2]


def run(suite: Path, packages: Path, select: str, workers: str) -> Path:
    """Run the tests of a laid-out folder; returns the file of results (JUnit's XML)."""
    results = suite / "results.xml"
    (suite / "pytest.ini").write_text("[pytest]\naddopts = -q --disable-warnings\n")
    path = [str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "tests/models/hope", f"--junitxml={results}", "--tb=short"]
    command += ["-k", select] if select else []
    command += ["-n", workers] if workers != "0" else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(command, cwd=suite, env=environment, check=False)
    return results


def main() -> int:
    """Fetch, lay out, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--transformers", help="a checkout of transformers, or a folder with its tests/")
    parser.add_argument("--cache", default=str(ROOT / ".cache" / "conformance"))
    parser.add_argument("--select", default="", help="which tests, as pytest's -k")
    parser.add_argument("--workers", default="0", help="processes, as pytest-xdist's -n; 0: this one")
    arguments = parser.parse_args()
    elsewhere = Path(arguments.transformers).resolve() if arguments.transformers else None
    if elsewhere is not None and not (elsewhere / "tests").is_dir():
        print(f"error: {elsewhere} has no folder tests: give a checkout of transformers", file=sys.stderr)
        return 2
    cache = Path(arguments.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    archive = fetch_archive(transformers.__version__, cache)
    missing = lay_out(archive, elsewhere, cache / "suite")
    results = run(cache / "suite", fetch_packages(cache), arguments.select, arguments.workers)
    if not results.exists():
        print("error: pytest wrote no results; see its output above", file=sys.stderr)
        return 2
    counts = read_results(results)
    print(render(counts, {name: count * len(CONFIGURATIONS) for name, count in missing.items()}))
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
