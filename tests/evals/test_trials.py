"""Runs of an evaluation: tuned, kept, resumed, failing, in several processes, and reported."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from nested_learning.cli.eval import options
from nested_learning.cli.main import main
from nested_learning.evals import Task, known_tasks, registry, runner
from nested_learning.evals.report.write import markdown_line
from nested_learning.evals.runner import EvalConfig, evaluate
from tests.evals.guessing import GOOD, Coin, CoinMethod


@pytest.fixture(autouse=True)
def _coin(monkeypatch):
    """The coin as the only task and its methods, for one test."""
    known_tasks()
    monkeypatch.setattr(registry, "_TASKS", {"coin": Coin})
    monkeypatch.setattr(registry, "_METHODS", {m.name: m for m in Coin(None).methods()})


def run(folder, *arguments, budget="small"):
    return main(["eval", "coin", "--budget", budget, "--quiet", "--output", str(folder), *arguments])


def test_settings_are_chosen_on_a_seed_of_their_own(tmp_path):
    (result,) = evaluate(EvalConfig(tasks=["coin"], output=str(tmp_path)))
    assert result.rows["tuned"].settings == {"bias": 0.4}
    assert list(result.rows) == ["good", "bad", "tuned", "always heads"]
    assert [o.trial.seed for o in result.outcomes if o.trial.tuning] == [1000] * 3
    assert sorted(result.rows["good"].figures) == [0, 1, 2]
    again = Coin.at("small").run(GOOD, 1)
    assert result.rows["good"].figures[1] == again


def test_what_is_kept_is_not_run_again(tmp_path, monkeypatch):
    config = EvalConfig(tasks=["coin"], output=str(tmp_path))
    (first,) = evaluate(config)
    monkeypatch.setattr(Coin, "run", lambda self, method, seed: pytest.fail("run again"))
    (second,) = evaluate(config)
    assert second.rows == first.rows
    with pytest.raises(pytest.fail.Exception, match="run again"):
        evaluate(dataclasses.replace(config, options={"coin": {"flips": 99}}))
    (fewer,) = evaluate(dataclasses.replace(config, seeds=[1], options={"coin": {"seeds": 2}}))
    assert fewer.rows["good"].figures == {1: first.rows["good"].figures[1]}


def test_trials_of_other_versions_are_said_and_made_again(tmp_path):
    config = EvalConfig(tasks=["coin"], methods=["good"], seeds=[0], output=str(tmp_path))
    evaluate(config)
    (path,) = (tmp_path / "trials").iterdir()
    kept = json.loads(path.read_text())
    kept["result"]["versions"]["torch"] = "1.0"
    kept["result"]["figures"]["heads"] = 7
    path.write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match=r"torch 1\.0, here .*made again"):
        (result,) = evaluate(config)
    assert result.rows["good"].figures[0]["heads"] < 1


def test_trials_of_several_folders_make_one_report(tmp_path, monkeypatch):
    for seed in (0, 1):
        assert run(tmp_path / str(seed), "--seeds", str(seed), "--methods", "good", "tuned") == 0
    files = [tmp_path / name / "trials.jsonl" for name in "01"]
    monkeypatch.setattr(Coin, "run", lambda self, method, seed: pytest.fail("run again"))
    assert run(tmp_path / "both", "--only_report", "--finished", *map(str, files)) == 0
    (task,) = json.loads((tmp_path / "both/results.json").read_text())["tasks"]
    rows = {row["method"]: row for row in task["rows"]}
    assert rows["good"]["seeds"] == [0, 1]
    assert rows["tuned"]["settings"] == {"bias": 0.4}
    assert task["left_out"] == ["bad"]
    assert "No run of: bad." in (tmp_path / "both/report.md").read_text()
    merged = (tmp_path / "both/trials.jsonl").read_text().splitlines()
    given = [line for path in files for line in path.read_text().splitlines()]
    assert set(merged) <= set(given)
    assert len(merged) == len(given) - 3  # each tuned on its own
    assert run(tmp_path / "again", "--only_report", "--finished", str(tmp_path / "both/trials.jsonl")) == 0
    (again,) = json.loads((tmp_path / "again/results.json").read_text())["tasks"]
    assert again["rows"] == task["rows"]


def test_a_report_of_finished_runs_needs_no_data(tmp_path, monkeypatch):
    assert run(tmp_path, "--methods", "good") == 0
    monkeypatch.setattr(Coin, "missing", lambda self: "a coin; mint one")
    assert run(tmp_path, "--methods", "good", "--only_report") == 0
    (task,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert task["skipped"] is None
    assert [row["method"] for row in task["rows"]] == ["good"]


def test_the_report_says_where_runs_were_made(tmp_path):
    assert run(tmp_path, "--methods", "good") == 0
    line = json.loads((tmp_path / "trials.jsonl").read_text().splitlines()[0])
    line |= {"seed": 5, "made": line["made"] | {"device_name": "another processor", "git": "abc"}}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(line) + "\n")
    assert run(tmp_path, "--methods", "good", "--seeds", "0", "1", "5", "--finished", str(other)) == 0
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"- 2 runs on \d{4}-\d\d-\d\d, .* thread\(s\), nested_learning .*, torch ", text)
    assert re.search(r"- 1 runs on .*, another processor, .* at abc, torch ", text)


def test_a_finished_trial_of_other_versions_is_made_again(tmp_path):
    assert run(tmp_path, "--methods", "good", "--seeds", "0") == 0
    line = json.loads((tmp_path / "trials.jsonl").read_text())
    line["made"]["transformers"] = "1.0"
    line["figures"]["heads"] = 7
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(line) + "\n")
    config = EvalConfig(tasks=["coin"], methods=["good"], seeds=[0], finished=[str(other)])
    with pytest.warns(RuntimeWarning, match=r"transformers 1\.0, here .*made again"):
        (result,) = evaluate(config)
    assert result.rows["good"].figures[0]["heads"] < 1


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"what": "trial"}', '{"what": "model"}'])
def test_finished_trials_that_cannot_be_read(tmp_path, capsys, text):
    path = tmp_path / "trials.jsonl"
    if text is not None:
        path.write_text(text)
    assert run(tmp_path / "out", "--finished", str(path)) == 2
    assert "a trials.jsonl that `nested-learning eval` wrote" in " ".join(capsys.readouterr().err.split())


def test_a_failed_trial_is_told_and_others_go_on(tmp_path, capsys):
    assert run(tmp_path, "--option", "coin.fail=bad") == 1
    report = json.loads((tmp_path / "results.json").read_text())
    (task,) = report["tasks"]
    assert [row["method"] for row in task["rows"] if row["seeds"]] == ["good", "tuned", "always heads"]
    assert len(task["failed"]) == 3
    assert "the coin | fell off <the> table" in capsys.readouterr().out
    assert "fell off &lt;the&gt; table" in (tmp_path / "report.html").read_text()
    assert "coin \\| fell off &lt;the&gt; table" in (tmp_path / "report.md").read_text()
    assert markdown_line("a\n*b*\u2028<i>|`") == "a \\*b\\* &lt;i&gt;\\|\\`"
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 3 + 3
    assert sum(line["error"] is not None for line in lines) == 3
    assert run(tmp_path, "--option", "coin.fail=nobody") == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_trial_that_gives_no_figures_fails_and_others_go_on(tmp_path, capsys, kept):
    kinds = {"nan": "heads is nan", "tensor": r"heads is tensor\(0\.5", "numpy": "heads is np.float32"}
    kinds |= {"None": "figures are None; expected a mapping", "text": "heads is 'many'; expected a number"}
    kinds |= {"deep": "more is .*JSON does not hold", "exit": "SystemExit: 3"}
    output = ["--output", str(tmp_path)] if kept else []
    for kind, words in kinds.items():
        given = ["--option", f"coin.fail=good {kind}", "--methods", "good", "bad"]
        assert main(["eval", "coin", "--seeds", "0", "1", "--quiet", *given, *output]) == 1
        found = capsys.readouterr().out
        assert len(re.findall(f"failed: coin good seed .: .*{words}", found)) == 2
        assert re.search(r"^good +0 ", found, re.MULTILINE)
        assert re.search(r"^bad +2 ", found, re.MULTILINE)
    if kept:
        assert len(list((tmp_path / "trials").iterdir())) == 2 * len(kinds)


def test_figures_are_the_same_whether_kept_or_not(monkeypatch):
    given = {"heads": 1, "parts": (1.5, True), "by length": {8: 0.5}}
    monkeypatch.setattr(Coin, "run", lambda self, method, seed: given)
    (result,) = evaluate(EvalConfig(tasks=["coin"], methods=["good"], seeds=[0]))
    assert result.rows["good"].figures[0] == json.loads(json.dumps(given))


def test_several_processes_give_the_same(tmp_path):
    (one,) = evaluate(EvalConfig(tasks=["coin"], methods=["good", "tuned"], seeds=[0]))
    (two,) = evaluate(EvalConfig(tasks=["coin"], methods=["good", "tuned"], seeds=[0], jobs=2))
    assert one.rows == two.rows


@pytest.mark.parametrize("killed", [False, True])
def test_processes_serve_tuning_and_report_and_are_replaced_where_one_was_killed(monkeypatch, killed):
    pools = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, jobs, context, start, arguments):
            super().__init__(jobs)
            self.taken = 0
            pools.append(self)

        def submit(self, run):
            self.taken += 1
            if killed and self is pools[0] and self.taken == 3:
                raise BrokenProcessPool
            return super().submit(run)

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Threads)
    (result,) = evaluate(EvalConfig(tasks=["coin"], methods=["good", "tuned"], seeds=[0, 1], jobs=2))
    assert [pool.taken for pool in pools] == ([3, 5] if killed else [7])  # of 3 settings, 2 methods, 2 seeds
    assert not result.failed
    assert all(pool._shutdown for pool in pools)


def test_no_trial_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("nested_learning.evals.runner.time.monotonic", lambda: next(clock))
    (result,) = evaluate(EvalConfig(tasks=["coin"], methods=["good"], max_minutes=1, output=str(tmp_path)))
    assert result.unfinished == 1
    assert "1 runs are still to be made" in json_and_text(tmp_path, result)


def json_and_text(folder, result):
    from nested_learning.evals.report.write import write_report

    write_report([result], "command", folder)
    return (folder / "report.md").read_text()


def test_the_report(tmp_path, capsys):
    assert run(tmp_path) == 0
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "**holds** | good − tuned" in text
    assert "**does not** | bad − good" in text
    assert "(paper 0.95)" in text
    assert "fewer flips than in the paper" in text
    assert "heads | tails &lt;b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    table = [line for line in text.splitlines() if line.startswith("| good |")]
    assert [line.count("|") - line.count("\\|") for line in table] == [6]  # no row has parameters
    assert "holds: good beats tuned beats bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "coins"], "unknown task 'coins'. Did you mean 'coin'?"),
        (["eval"], "no task is named"),
        (["eval", "coin", "--methods", "goood"], "unknown method 'goood'. Did you mean 'good'?"),
        (["eval", "coin", "--budget", "huge"], "unknown budget 'huge'"),
        (["eval", "coin", "--option", "coin.flip=3"], "unknown option of coin 'flip'. Did you mean 'flips'?"),
        (["eval", "coin", "--option", "coin.flips=many"], "flips is 'many'; expected a whole number"),
        (["eval", "coin", "--option", "coin.flips=many"], "Set --option coin.flips=… accordingly."),
        (["eval", "coin", "--option", "coin.seeds=0"], "seeds is 0; expected 1 to 1000 reported seeds."),
        (["eval", "coin", "--option", "coin.seeds=1001"], "Set --option coin.seeds=… accordingly."),
        (["eval", "coin", "--option", "coin.flips=-1"], "flips is -1; expected no number below 0. Set --opt"),
        (["eval", "coin", "--output", ""], "output is ''; expected the path of a folder; the current one is"),
        (["eval", "coin", "--option", "coin.flips=5", "--option", "coin.flips=6"], "given as 5 and as 6"),
        (["eval", "coin", "--option", "coin.flips=1", "coin.flips=true"], "given as 1 and as True"),
        (["eval", "coin", "coin"], "the tasks are coin, coin; expected one or more names, all different"),
        (["eval", "all", "coin"], "the tasks are all, coin; `all` stands alone"),
        (["eval", "coin", "--seeds", "1", "--seeds", "1"], "seeds is [1, 1]; expected one or more, all diff"),
        (["eval", "coin", "--option", "flips=3"], "has not the form TASK.NAME=VALUE"),
        (["eval", "coin", "--seeds", "1000"], "seed 1000 chooses settings"),
        (["eval", "coin", "--seeds", "1", "1"], "all different"),
        (["eval", "coin", "--jobs", "0"], "jobs is 0"),
        (["eval", "coin", "--max_minutes", "0"], "max_minutes is 0"),
    ],
)
def test_bad_input(arguments, words, capsys):
    assert main([*arguments, "--quiet"]) == 2
    assert words in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_told_with_the_way_out(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(output) == 2
        told = capsys.readouterr().err
        assert f"the output folder {output} cannot be made: " in told
        assert "Choose another --output." in told


def test_no_more_processes_are_started_than_cores_can_use(monkeypatch):
    asked = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, jobs, context, start, arguments):
            super().__init__(1)
            asked.append((jobs, arguments))

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(runner, "usable_cores", lambda: 3)
    config = {"tasks": ["coin"], "methods": ["good"], "seeds": [0, 1]}
    with pytest.warns(RuntimeWarning, match=r"jobs is 100000, .* 3 cores: 12 processes .* best to 3"):
        (many,) = evaluate(EvalConfig(**config, jobs=100_000))
    (few,) = evaluate(EvalConfig(**config, jobs=12))
    assert asked == [(12, (1,))] * 2
    assert many.rows == few.rows


def test_flags_may_be_repeated(tmp_path):
    repeated = ["--option", "coin.flips=7", "--seeds", "4", "--option", "coin.fail=bad", "coin.flips=7"]
    assert run(tmp_path, *repeated, "--methods", "good", "--models=bad", "--seeds", "5") == 1
    (task,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert task["options"] == {"flips": 7, "seeds": 3, "fail": "bad"}
    assert [(row["method"], row["seeds"]) for row in task["rows"][:2]] == [("good", [4, 5]), ("bad", [])]


def test_methods_are_also_those_of_the_tasks_themselves(tmp_path, monkeypatch, capsys):
    class Dice(Coin):
        name = "dice"

        def methods(self):
            return [CoinMethod("six", chance=1 / 6)]

    monkeypatch.setattr(registry, "_METHODS", {})
    monkeypatch.setattr(registry, "_TASKS", {"coin": Coin, "dice": Dice})
    coin, dice = evaluate(EvalConfig(tasks=["coin", "dice"], methods=["six", "good"], seeds=[0]))
    for result in (coin, dice):
        assert {name for name, row in result.rows.items() if row.figures} == {"six", "good", "always heads"}
    assert main(["eval", "dice", "--methods", "good", "--quiet"]) == 2
    assert "unknown method 'good'. Known: six." in capsys.readouterr().err


def test_a_package_that_cannot_be_loaded_is_named_and_others_go_on(monkeypatch):
    class Broken:
        name, value, dist = "ours", "ours.tasks", SimpleNamespace(name="broken-package", version="1.2")

        def __init__(self, error):
            self.error = error

        def load(self):
            raise self.error

    loaded = []
    good = SimpleNamespace(load=lambda: loaded.append("good"))
    broken = [Broken(ModuleNotFoundError("No module named 'lost'")), Broken(SystemExit(3))]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*broken, good])
    with pytest.warns(RuntimeWarning, match=r"ours = ours\.tasks of broken-package 1\.2 .* 'lost'"):
        registry._load.__wrapped__()
    assert loaded == ["good"]


def test_a_method_that_no_task_takes(monkeypatch):
    monkeypatch.setattr(Coin, "accepts", lambda self, method: "it is no coin")
    with pytest.raises(ValueError, match="no task takes the method: it is no coin"):
        evaluate(EvalConfig(tasks=["coin"], methods=["good"]))


def test_what_the_machine_lacks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Coin, "missing", lambda self: "a coin; mint one")
    assert run(tmp_path) == 0
    assert "Not run: a coin; mint one" in (tmp_path / "report.md").read_text()


def test_options_of_the_command_line():
    given = ["a.x=1", "a.y=text", 'b.z={"k": [1]}', "b.w=true"]
    assert options(given) == {"a": {"x": 1, "y": "text"}, "b": {"z": {"k": [1]}, "w": True}}
    with pytest.raises(ValueError, match=r"--option b\.z: 'k' stands twice in one group"):
        options(['b.z={"k": 1, "k": 2}'])


def test_the_list(capsys):
    assert main(["eval", "--list"]) == 0
    assert "heads | tails" in capsys.readouterr().out


def test_names_are_given_once():
    class Other(Task):
        name = "coin"

    with pytest.raises(ValueError, match="registered already"):
        registry.register_task(Other)
    assert registry.register_task(Coin) is Coin
