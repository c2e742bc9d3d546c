"""Settings that are chosen on one seed or on several, and what is said of it."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from nested_learning.cli.main import main
from nested_learning.evals import TUNING_SEED, find_method, find_task, known_tasks, registry
from nested_learning.evals.runner import EvalConfig, evaluate
from tests.evals.guessing import Coin, CoinOptions


@dataclass(frozen=True)
class TunedOptions(CoinOptions):
    tuning_seeds: int = 2


HEADS = {
    0.2: [0.9, None, None],
    0.4: [0.5, 0.5, 0.5],
    0.3: [0.7, 0.4, 0.1],
}  # by bias, at seeds 1000, 1001, …


class TunedCoin(Coin):
    """The coin, tuned on several seeds: one setting fails at all but the first of them."""

    budgets: ClassVar = {"small": TunedOptions()}

    def tune(self, method, seed):
        return {"heads": HEADS[method.settings["bias"]][seed - TUNING_SEED]}


class LowestCoin(TunedCoin):
    higher_is_better = False


@pytest.fixture
def coins(monkeypatch):
    known_tasks()
    coins = {"coin": Coin, "tuned": TunedCoin, "lowest": LowestCoin}
    for name, cls in coins.items():
        monkeypatch.setattr(cls, "name", name)
    monkeypatch.setattr(registry, "_TASKS", coins)
    monkeypatch.setattr(registry, "_METHODS", {m.name: m for m in Coin(None).methods()})


@pytest.mark.parametrize(
    ("task", "count", "bias"), [("tuned", 1, 0.2), ("tuned", 2, 0.3), ("tuned", 3, 0.4), ("lowest", 3, 0.3)]
)
def test_the_setting_with_the_best_mean_that_failed_at_no_seed_is_chosen(coins, tmp_path, task, count, bias):
    config = EvalConfig(tasks=[task], tuning_seeds=count, methods=["tuned"], output=str(tmp_path), jobs=1)
    (result,) = evaluate(config)
    assert result.rows["tuned"].settings == {"bias": bias}
    seeds = sorted(outcome.trial.seed for outcome in result.outcomes if outcome.trial.tuning)
    assert seeds == sorted([*range(1000, 1000 + count)] * 3)


def test_tuning_on_more_seeds_goes_on_from_what_is_kept(coins, tmp_path, monkeypatch):
    def at(**given):
        return evaluate(EvalConfig(tasks=["tuned"], methods=["tuned"], output=str(tmp_path), **given))[0]

    at(tuning_seeds=1)
    made = []
    tune = TunedCoin.tune
    monkeypatch.setattr(TunedCoin, "tune", lambda self, m, seed: (made.append(seed), tune(self, m, seed))[1])
    assert at().rows["tuned"].settings == {"bias": 0.3}  # two, as the options say
    assert made == [1001] * 3
    assert at(options={"tuned": {"tuning_seeds": 3}}).rows["tuned"].settings == {"bias": 0.4}
    assert made == [1001] * 3 + [1002] * 3


def test_a_row_whose_tuning_is_not_done_is_no_row_of_a_report(coins, tmp_path):
    config = {"tasks": ["tuned"], "methods": ["tuned"], "output": str(tmp_path)}
    evaluate(EvalConfig(tuning_seeds=1, **config))
    (result,) = evaluate(EvalConfig(tuning_seeds=2, only_report=True, **config))
    assert result.left_out == ["tuned"]
    assert result.unfinished == 3 + 3  # of tuning, and then those that are reported


def test_the_report_says_on_which_seeds(coins, tmp_path, capsys):
    for task, more, words in (
        ("tuned", [], "Settings are chosen on seeds, by the mean, 1000, 1001."),
        ("tuned", ["--tuning_seeds", "1"], "Settings are chosen on seed 1000."),
    ):
        assert main(["eval", task, "--quiet", "--output", str(tmp_path), *more]) == 0
        assert words in (tmp_path / "report.md").read_text()
        assert words in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["tasks"][0]["tuned_on"] == [1000]
    assert main(["eval", "tuned", "--quiet", "--output", str(tmp_path), "--methods", "good"]) == 0
    assert "Settings are chosen" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coin", "--tuning_seeds", "2"], "coin choose settings on no number of seeds"),
        (
            ["tuned", "--tuning_seeds", "0"],
            "tuning_seeds is 0; expected 1 to 1000 seeds that choose settings",
        ),
        (["tuned", "--tuning_seeds", "2", "--option", "tuned.tuning_seeds=3"], "expected one of the two"),
        (["coin", "--option", "coin.tuning_seeds=2"], "tuning_seeds"),
        (
            ["tuned", "--seeds", "7", "1001"],
            "seed 1001 chooses settings of tuned; expected others in --seeds",
        ),
        (["coin", "--seeds", "1000"], "seed 1000 chooses settings of coin; expected others in --seeds"),
    ],
)
def test_what_cannot_be_is_said(coins, capsys, arguments, words):
    assert main(["eval", *arguments, "--quiet"]) == 2
    assert words in capsys.readouterr().err


def test_tasks_that_count_their_seeds_are_given_them_beside_others(coins, tmp_path):
    coin, tuned = evaluate(EvalConfig(tasks=["coin", "tuned"], tuning_seeds=3, methods=["tuned"]))
    assert {o.trial.seed for o in coin.outcomes if o.trial.tuning} == {1000}
    assert {o.trial.seed for o in tuned.outcomes if o.trial.tuning} == {1000, 1001, 1002}


def test_seeds_that_choose_decide_no_run(coins):
    many, few = (find_task("tuned").at("small", tuning_seeds=count) for count in (7, 1))
    from nested_learning.evals.trial import Trial

    assert Trial(many, find_method("good"), 0).key() == Trial(few, find_method("good"), 0).key()


def test_every_task_with_settings_counts_its_seeds_or_has_tuning_data_of_its_own():
    own = {"longdoc", "lm_eval"}  # documents for tuning
    for name, cls in known_tasks().items():
        task = cls.at("small")
        tuned = any(len(task.grid(method)) > 1 for method in task.methods())
        assert not tuned or name in own or "tuning_seeds" in vars(task.options), name
        if name not in own and "tuning_seeds" in vars(task.options):
            assert list(cls.at("small", tuning_seeds=2).tuning_seeds()) == [1000, 1001]
