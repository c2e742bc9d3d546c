"""The runs that docs/evaluations keeps lead to the verdicts that docs/results.md states."""

import json

import pytest

from nested_learning.evals.kept import TrialCache
from nested_learning.evals.runner import SEEDS
from website import claims


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:  # what was found stays so with other versions
        patch.setattr(TrialCache, "_of_these_versions", lambda self, made_with: True)
        return claims.results()


def test_every_kept_run_has_its_place_in_the_report(results):
    lines = [json.loads(line) for line in claims.KEPT.read_text(encoding="utf-8").splitlines()]
    shown = sum(len(result.outcomes) for result in results)
    assert shown == len(lines) > 0
    assert all(line["made"]["git"] and line["made"]["device_name"] for line in lines)


def test_the_table_of_claims_is_that_of_the_runs(results):
    _, _, rest = claims.RESULTS.read_text(encoding="utf-8").partition(claims.BEGIN)
    assert rest.partition(claims.END)[0] == claims.table(results)
    assert claims.table(results).count("| **") >= len(results)


def test_rows_have_three_seeds_or_say_so(results):
    for result in results:
        for row in result.rows.values():
            assert len(row.figures) >= min(SEEDS, getattr(result.task.options, "seeds", SEEDS)), row.method


def test_runs_are_taken_over_once(tmp_path, monkeypatch):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    line = {"what": "trial", "task": "recall", "version": 1, "options": {}, "method": {"name": "hope"}}
    line |= {"seed": 0, "tuning": False, "device": "cpu", "figures": {"x": 1.0}, "seconds": 1.0, "made": {}}
    runs = [
        {**line, "error": None},
        {**line, "seed": 1, "error": "it failed"},
        {**line, "seed": 2, "error": None},
    ]
    first.write_text("".join(json.dumps(each) + "\n" for each in runs[:2]))
    second.write_text("".join(json.dumps({**each, "seconds": 2.0}) + "\n" for each in runs))
    monkeypatch.setattr(claims, "KEPT", tmp_path / "kept" / "trials.jsonl")
    assert claims.take_over([first]) == 1
    assert claims.take_over([first, second]) == 1
    kept = [json.loads(each) for each in claims.KEPT.read_text().splitlines()]
    assert [(each["seed"], each["seconds"]) for each in kept] == [(0, 1.0), (2, 2.0)]
