"""Trials that were made before, in a folder or in files of others: which count, and what is said of them."""

import json
import re
import shutil
import warnings
from statistics import fmean

import pytest

from nested_learning import _files
from nested_learning.cli.main import main
from nested_learning.evals import known_tasks, registry
from nested_learning.evals.kept import TrialCache
from nested_learning.evals.runner import EvalConfig, evaluate
from tests.evals.guessing import Coin


@pytest.fixture(autouse=True)
def _coin_alone(monkeypatch):
    """The coin as the only task and its methods, for one test."""
    known_tasks()
    monkeypatch.setattr(registry, "_TASKS", {"coin": Coin})
    monkeypatch.setattr(registry, "_METHODS", {m.name: m for m in Coin(None).methods()})


@pytest.fixture
def given(tmp_path):
    """(folder, lines) of six finished runs."""
    folder = tmp_path / "given"
    evaluate_to(folder)
    return folder, [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def evaluate_to(folder, *arguments):
    command = ["eval", "coin", "--methods", "good", "bad", "--seeds", "0", "1", "2", "--quiet"]
    return main([*command, "--output", str(folder), *arguments])


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def of_files(*paths, only_report=True, **changed):
    """(result, sentences that are said of the files) of a report of finished runs."""
    said = []
    options = {"methods": ["good", "bad"], "seeds": [0, 1, 2], "only_report": only_report, **changed}
    (result,) = evaluate(EvalConfig(tasks=["coin"], finished=list(map(str, paths)), **options), said.append)
    return result, said


def test_files_say_how_many_of_their_runs_are_used(given, tmp_path, capsys):
    folder, lines = given
    result, said = of_files(folder / "trials.jsonl")
    assert said == [f"{folder}/trials.jsonl: 6 of 6 runs are used"]
    assert len(result.outcomes) == 6
    other = [lines[0], {**lines[1], "version": 2}, {**lines[2], "options": {"flips": 7, "fail": ""}}]
    other += [{**lines[3], "task": "dice"}, {**lines[4], "seed": 9}, {**lines[5], "error": "it fell"}]
    other += [{**lines[0], "tuning": True}, {**lines[0], "method": {**lines[0]["method"], "name": "worse"}}]
    other += [{**lines[0], "method": {**lines[0]["method"], "chance": 0.5}}]
    path = written(tmp_path / "other.jsonl", other)
    assert evaluate_to(tmp_path / "out", "--finished", path, "--only_report") == 0
    said = capsys.readouterr().err
    assert (
        f"{path}: 1 of 9 runs are used; the others are 1 of another version of the task (2, here 1); " in said
    )
    assert "1 of other options (flips 7, here 100); 1 of tasks that are not asked for (dice); " in said
    assert (
        "1 of seeds that are not asked for (9); 1 failed ones; 1 of tuning, which is not asked for; " in said
    )
    assert "1 of methods that are not asked for (worse); 1 of other settings of a method (good)" in said
    with pytest.warns(RuntimeWarning, match="1 of 9 runs are used"):
        evaluate(EvalConfig(tasks=["coin"], finished=[path], only_report=True))


@pytest.mark.parametrize("only_report", [True, False])
def test_runs_of_another_device_count_and_a_mixed_row_says_so(given, tmp_path, only_report, capsys):
    _, lines = given
    for line in lines[:2] + lines[3:]:
        line["device"] = "cuda"
    path = written(tmp_path / "cuda.jsonl", lines)
    result, said = of_files(path, only_report=only_report)
    assert said == [f"{path}: 6 of 6 runs are used"]
    assert result.mixed == {"good": "cpu (seeds 2), cuda (seeds 0, 1)"}
    assert evaluate_to(tmp_path / "out", "--finished", path, "--only_report") == 0
    words = "uns of good were made on several devices: cpu (seeds 2), cuda (seeds 0, 1)"
    assert words in capsys.readouterr().out
    assert words in (tmp_path / "out/report.md").read_text()
    assert words in (tmp_path / "out/report.html").read_text()
    again = [json.loads(line) for line in (tmp_path / "out/trials.jsonl").read_text().splitlines()]
    assert again == lines


def test_a_report_takes_the_runs_of_its_folder_whatever_their_device(given, monkeypatch):
    folder, _ = given
    for path in (folder / "trials").iterdir():
        kept = json.loads(path.read_text())
        kept["key"]["device"] = "cuda"
        path.unlink()
        place = TrialCache(folder / "trials").cache.path(kept["key"])
        place.write_text(json.dumps(kept))
    result, _ = of_files(output=str(folder))
    assert {name: len(row.figures) for name, row in result.rows.items()} == {
        "good": 3,
        "bad": 3,
        "always heads": 3,
    }
    assert not result.mixed
    monkeypatch.setattr(Coin, "run", lambda self, method, seed: {"heads": 0.5})
    result, _ = of_files(output=str(folder), only_report=False)  # new runs are of this device
    assert result.rows["bad"].mean("heads") == 0.5


def test_different_figures_of_one_run_are_named_with_both_places(given, tmp_path):
    folder, lines = given
    changed = [{**line, "figures": {"heads": 0.0}} for line in lines]
    path = written(tmp_path / "changed.jsonl", changed)
    first = folder / "trials.jsonl"
    told = rf"6 runs have different figures .*good seed 0, in line 1 of {first} and line 1 of {path}\)"
    with pytest.warns(RuntimeWarning, match=told):
        result, said = of_files(first, path)
    assert result.rows["bad"].figures[0] == lines[3]["figures"]
    assert said[1] == f"{path}: 0 of 6 runs are used; the others are 6 replaced by another of the same trial"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_files(first, written(tmp_path / "same.jsonl", [{**line, "seconds": 9.0} for line in lines]))


def test_a_report_says_once_that_runs_of_other_versions_are_left_out(given, tmp_path):
    _, lines = given
    for line in lines:
        line["made"]["torch"] = "1.0"
    path = written(tmp_path / "old.jsonl", lines)
    with pytest.warns(RuntimeWarning) as found:
        result, said = of_files(path)
    told = [str(each.message) for each in found]
    assert len(told) == 1
    assert re.match(
        r"6 runs \(the first: coin good seed 0\) were kept by torch 1\.0, here .*: they are left out", told[0]
    )
    assert "0 of 6 runs are used; the others are 6 of other versions (torch 1.0, here " in said[0]
    assert result.left_out == ["good", "bad"]


def test_the_build_of_a_package_is_no_other_version(given, tmp_path):
    _, lines = given
    for line in lines:
        line["made"]["torch"] = line["made"]["torch"].partition("+")[0] + "+cu999"
    result, _ = of_files(written(tmp_path / "built.jsonl", lines))
    assert len(result.outcomes) == 6


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("figures", None, "its figures is None"),
        ("figures", [1], "its figures is [1]"),
        ("figures", {"heads": "many"}, "its figure heads is 'many'"),
        ("figures", ..., "its figures is missing"),
        ("seconds", "x", "its seconds is 'x'"),
        ("seconds", ..., "its seconds is missing"),
        ("made", None, "its made is None"),
        ("versions", None, "its versions is None"),
        (None, 7, "it is 7"),
    ],
)
def test_a_damaged_file_of_the_folder_counts_as_absent(given, name, value, words):
    folder, _ = given
    path = next((folder / "trials").iterdir())
    kept = json.loads(path.read_text())
    if name is None:
        kept["result"] = value
    elif value is ...:
        del kept["result"][name]
    else:
        kept["result"][name] = value
    path.write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match=re.escape(f"{path} is passed over: {words}")):
        result, _ = of_files(output=str(folder), only_report=False)
    assert len(result.outcomes) == 6
    assert not result.failed


def test_a_folder_in_the_place_of_a_file_is_named(given):
    folder, _ = given
    path = next((folder / "trials").iterdir())
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning) as found:
        result, _ = of_files(output=str(folder), only_report=False)
    told = " ".join(str(each.message) for each in found)
    assert f"{path} is passed over: it is no file" in told
    assert re.search(rf"coin \w+ seed . is not kept: cannot write {path}: it is a folder", told)
    assert len(result.outcomes) == 6
    assert not result.failed


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("figures", [1], "its figures is [1]"),
        ("figures", {"heads": "many"}, "its figure heads is 'many'"),
        ("figures", {"heads": float("nan")}, "its figure heads is nan"),
        ("seconds", None, "its seconds is None"),
        ("seconds", ..., "its seconds is missing"),
        ("made", {"date": []}, "its made is"),
        ("method", "good", "its method is 'good'"),
        ("options", ..., "its options is missing"),
        ("device", ..., "its device is missing"),
        ("seed", "0", "its seed is '0'"),
        ("error", ..., "its error is missing"),
    ],
)
def test_a_damaged_line_is_named_with_its_file(given, tmp_path, capsys, name, value, words):
    _, lines = given
    if value is ...:
        del lines[1][name]
    else:
        lines[1][name] = value
    path = written(tmp_path / "damaged.jsonl", lines)
    assert evaluate_to(tmp_path / "out", "--finished", path, "--only_report") == 2
    assert f"line 2 of {path} is not fit: {words}" in capsys.readouterr().err


def test_lines_that_say_little_of_where_they_were_made_are_reported(given, tmp_path, monkeypatch):
    _, lines = given
    lines = [{**line, "made": {"date": "2026-01-01"}} for line in lines]
    monkeypatch.setattr(TrialCache, "_of_these_versions", lambda self, made_with: True)
    path = written(
        tmp_path / "little.jsonl", [*lines[:5], {k: v for k, v in lines[5].items() if k != "made"}]
    )
    assert evaluate_to(tmp_path / "out", "--finished", path, "--only_report") == 0
    assert "5 runs on 2026-01-01" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("place", ["trials", "."])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_run(given, monkeypatch, capsys, place):
    folder, _ = given
    shutil.rmtree(folder / "trials")
    (folder / "trials").mkdir()
    make = _files.tempfile.TemporaryFile

    def refuse(dir):
        if dir == folder / place:
            raise PermissionError(13, "Permission denied")
        return make(dir=dir)

    monkeypatch.setattr(_files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Coin, "run", lambda self, method, seed: pytest.fail("run"))
    assert evaluate_to(folder) == 2
    assert (
        f"the output folder {folder / place} cannot be written: Permission denied" in capsys.readouterr().err
    )


def test_rows_of_different_seeds_are_compared_by_those_that_all_have(given, tmp_path):
    _, lines = given
    heads = {(each["method"]["name"], each["seed"]): each["figures"]["heads"] for each in lines}
    for fewer, words in (
        ([("bad", 0)], f"(1, 2): good {fmean([heads['good', 1], heads['good', 2]]):.3f}, bad "),
        ([("bad", 0), ("bad", 1), ("good", 2)], "Rows have different seeds, none in common"),
        ([("bad", 0), ("good", 0)], None),
        ([], None),
    ):
        left = [each for each in lines if (each["method"]["name"], each["seed"]) not in fewer]
        path, out = written(tmp_path / "some.jsonl", left), tmp_path / f"out{len(left)}"
        assert evaluate_to(out, "--finished", path, "--only_report") == 0
        for page in ("report.md", "report.html"):
            text = (out / page).read_text()
            assert ("different seeds" in text) == (words is not None)
            assert words is None or words in text
