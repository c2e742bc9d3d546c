"""Every task, once: one trial in seconds, and all of them by the command."""

import json

import pytest

from nested_learning.cli.main import main
from nested_learning.evals import known_tasks
from nested_learning.evals.trial import Trial

TASKS = known_tasks()


@pytest.mark.parametrize("name", TASKS)
def test_one_trial(name):
    """The first method of the table at its first settings: figures as JSON, the headline among them."""
    task = TASKS[name].at("smoke")
    if lacking := task.missing():
        pytest.skip(lacking)
    method = task.methods()[0]
    outcome = Trial(task, method.at(task.grid(method)[0]), seed=0).run()
    assert outcome.error is None
    json.dumps(outcome.figures, allow_nan=False)
    assert isinstance(outcome.figures[task.headline], (int, float))
    assert task.headline in task.columns
    assert all(task.headline in row for row in task.constants().values())


@pytest.mark.slow
def test_all_tasks_by_the_command(tmp_path, capsys):
    assert main(["eval", "all", "--budget", "smoke", "--output", str(tmp_path), "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in report["tasks"]] == list(TASKS)
    for task in report["tasks"]:
        assert task["skipped"] or not (task["failed"] or task["unfinished"])
        assert task["skipped"] or (tmp_path / task["figure"]).stat().st_size > 0
    assert (tmp_path / "report.html").stat().st_size > 0
