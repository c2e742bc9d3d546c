"""`--against`: two processes take turns, the package of the other one is the other folder's."""

from __future__ import annotations

import ast
import subprocess
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import against
from nested_learning.training.report import git_revision

ROOT = Path(__file__).parents[2]
TINY = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}
LONG = {**TINY, "batch": 8, "tokens": 4096}  # a call takes several seconds


@pytest.mark.slow
def test_both_run_in_turn_and_both_commits_are_named(monkeypatch, capfd):
    found = {}

    def keep(*arguments):
        found.update(in_turns(*arguments))
        return found

    in_turns = against.in_turns
    monkeypatch.setattr(against, "in_turns", keep)
    figures = against.compare(ROOT, [("peers", {"shape": TINY})], repeats=3)

    assert figures["here"] == git_revision() is not None
    assert figures["there"] == figures["here"]
    assert figures["here"] in capfd.readouterr().out
    works = ["titans", "self_modifying_titans"]
    assert [row["work"] for row in figures["rows"]] == works
    for row in figures["rows"]:
        assert row["ratio"] == pytest.approx(row["there, ms"] / row["here, ms"])
    expected = [
        span
        for turn in range(3)
        for work in works
        for span in (found[work].here[turn], found[work].there[turn])
    ]
    assert len(expected) == sum(len(spans) for turns in found.values() for spans in turns)
    assert all(before.start < before.end < after.start for before, after in pairwise(expected))


def test_the_worker_ends_in_the_middle_of_a_call_when_its_input_does():
    other = against.Runner(ROOT, "peers", {"shape": LONG})
    process = other._process
    try:
        process.stdin.write('{"call": "self_modifying_titans"}\n')
        process.stdin.flush()
        time.sleep(0.5)
        process.stdin.close()  # as it is when the parent is gone
        assert process.wait(timeout=10) == 0
        assert process.stdout.read() == ""  # the call had not ended
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def repository(folder, package):
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    if package is not None:
        (folder / "nested_learning").mkdir()
        (folder / "nested_learning" / "__init__.py").write_text(package)


def test_the_package_is_that_of_the_folder(tmp_path):
    repository(tmp_path, "raise ImportError('the one of the folder')")
    with pytest.raises(against.RunnerFailed, match="ImportError: the one of the folder"):
        against.Runner(against.checkout(str(tmp_path)), "peers", {"shape": TINY})


def test_the_cases_import_public_names_alone():
    """An older or a newer package has other modules."""
    tree = ast.parse((ROOT / "benchmarks" / "cases.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module.startswith(("nested_learning", "benchmarks", "tests"))}
    assert ours == {"nested_learning", "nested_learning.layers", "nested_learning.continual"}


@pytest.mark.parametrize("kind", ["no folder", "empty", "no package", "no checkout"])
@pytest.mark.parametrize("benchmark", ["layers", "peers", "decode"])
def test_other_folders_are_refused(benchmark, kind, tmp_path, capsys):
    folder = tmp_path / "folder"
    if kind != "no folder":
        folder.mkdir()
    if kind == "no package":
        repository(folder, None)
    if kind == "no checkout":  # inside of one
        repository(tmp_path, "")
        folder = tmp_path / "nested_learning"
    with pytest.raises(SystemExit) as stopped:
        import_module(f"benchmarks.{benchmark}").main(["--quick", "--against", str(folder)])
    assert stopped.value.code == 2
    assert "is no checkout with a package nested_learning; make one with" in capsys.readouterr().err


@pytest.mark.parametrize(("benchmark", "question"), [("layers", "compile"), ("scaling", "attention")])
def test_questions_about_what_is_not_public_are_refused(benchmark, question, capsys):
    with pytest.raises(SystemExit) as stopped:
        import_module(f"benchmarks.{benchmark}").main([question, "--quick", "--against", str(ROOT)])
    assert stopped.value.code == 2
    assert "no public name" in capsys.readouterr().err
