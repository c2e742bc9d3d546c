"""`--extras` makes failures of tests that skip since a package of requirements-extras.lock is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import distributions

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_needs_a_package_of_the_lock_file():
    pytest.importorskip("lm_eval.models")

def test_needs_another_package():
    pytest.importorskip("no_such_package_anywhere")

def test_skips_for_a_reason():
    pytest.skip("not on this machine")
"""
MODULE = "import pytest\n\ntrl = pytest.importorskip('trl')\n\ndef test_it():\n    pass\n"
# A name that is None in sys.modules cannot be imported, installed or not.
CONFTEST = "import sys\nsys.modules.update(trl=None, lm_eval=None)\nfrom tests.conftest import *\n"


def run(folder: Path, *options: str) -> str:
    """Output of pytest on both files."""
    for name, text in (("conftest.py", CONFTEST), ("test_some.py", TESTS), ("test_all.py", MODULE)):
        (folder / name).write_text(text)
    options = ("-p", "no:cacheprovider", "--rootdir", ".", "--continue-on-collection-errors", *options)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int("--extras" in options), done.stdout
    return done.stdout


def test_with_the_option(tmp_path):
    out = run(tmp_path, "--extras")
    assert "1 failed, 2 skipped" in out
    assert "1 error" in out
    for name in ("lm_eval", "trl"):
        assert f"{name} is pinned in requirements-extras.lock" in out


def test_without_the_option(tmp_path):
    assert "4 skipped" in run(tmp_path)


def test_the_lock_file_has_what_is_tried():
    assert {"peft", "trl", "torchao", "lm_eval", "onnx", "onnxscript"} <= distributions()
    assert "torch" not in distributions()
