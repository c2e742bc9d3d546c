"""Run transformers' common tests on Hope and report.

    python -m tests.conformance [--transformers FOLDER] [--only CONFIGURATION ...] [--select EXPRESSION]

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


def run(suite: Path, packages: Path, configuration: str, select: str) -> Path:
    """Run the tests of one configuration in a laid-out folder; returns their outcomes (JUnit's XML)."""
    results = suite / f"{configuration}.xml"
    (suite / "pytest.ini").write_text("[pytest]\naddopts = -q --disable-warnings\n")
    path = [str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
    chosen = f"Hope_{configuration}" + (f" and ({select})" if select else "")
    command = [sys.executable, "-m", "pytest", "tests/models/hope", f"--junitxml={results}", "-k", chosen]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    print(f"{configuration}:", flush=True)
    subprocess.run([*command, "--tb=short"], cwd=suite, env=environment, check=False)
    return results


def main() -> int:
    """Fetch, lay out, run, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--transformers", help="a checkout of transformers, or a folder with its tests/")
    parser.add_argument("--cache", default=str(ROOT / ".cache" / "conformance"))
    parser.add_argument("--only", nargs="+", choices=[*CONFIGURATIONS], default=[*CONFIGURATIONS])
    parser.add_argument("--select", default="", help="which tests, as pytest's -k")
    arguments = parser.parse_args()
    elsewhere = Path(arguments.transformers).resolve() if arguments.transformers else None
    if elsewhere is not None and not (elsewhere / "tests").is_dir():
        print(f"error: {elsewhere} has no folder tests: give a checkout of transformers", file=sys.stderr)
        return 2
    cache = Path(arguments.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    archive, packages = fetch_archive(transformers.__version__, cache), fetch_packages(cache)
    missing = lay_out(archive, elsewhere, cache / "suite")
    paths = [run(cache / "suite", packages, name, arguments.select) for name in arguments.only]
    if not all(path.exists() for path in paths):
        print("error: pytest wrote no results; see its output above", file=sys.stderr)
        return 2
    results = read_results(paths)
    print(render(results, {name: count * len(paths) for name, count in missing.items()}))
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
