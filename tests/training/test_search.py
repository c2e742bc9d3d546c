"""A search over a grid: what is tried, chosen, cut, and that it goes on from what is kept."""

from contextlib import contextmanager

import pytest

from nested_learning._progress import progress
from nested_learning.training import compare as compare_module
from nested_learning.training.compare import CompareConfig, Contender, compare
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import dump_config
from nested_learning.training.contestants import Contestant
from nested_learning.training.grid import check_grid, described, parse_grid, settings_of, tuned
from nested_learning.training.search import SearchClock, search

GRID = {"optim.lr": [1e-3, 2e-2], "optim.weight_decay": [0.0, 0.1]}


# The grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("optim.lr=3e-3,1e-2;optim.eps=0,0.1", {"optim.lr": [3e-3, 1e-2], "optim.eps": [0, 0.1]}),
        (" optim.betas = [0.9,0.95], [0.9,0.99] ", {"optim.betas": [[0.9, 0.95], [0.9, 0.99]]}),
        ('optim.options={"a":[1,2],"b":"x;y,z"},{}', {"optim.options": [{"a": [1, 2], "b": "x;y,z"}, {}]}),
        ("optim.schedule=cosine,linear", {"optim.schedule": ["cosine", "linear"]}),
        ('model.mixer="titans",deltanet', {"model.mixer": ["titans", "deltanet"]}),
        ("optim.options.nesterov=true,false;model.cms_expansion=2,null",
         {"optim.options.nesterov": [True, False], "model.cms_expansion": [2, None]}),
    ],
)  # fmt: skip
def test_grids(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the part ''; expected KEY=VALUE"),
        ("optim.lr", "the part 'optim.lr'"),
        ("optim.lr=", "the part 'optim.lr='"),
        ("=1", "the part '=1'"),
        ("optim.lr=1,,2", "an empty value"),
        ("optim.lr=1;", "the part ''"),
        ("optim.lr=1;optim.lr=2", "'optim.lr' twice"),
        ("optim.lr=1,1", "all different"),
        ('optim={"lr": 1, "lr": 2}', "'lr' stands twice in one group"),
        ("optim.lr=[1", r"'\[1', which is no JSON"),
        ("optim.weight_decoy=1", "Did you mean 'optim.weight_decay'"),
        ("batch_size=1,2", "unknown key of --grid"),
        ("model.=1", "unknown key of --grid"),
        ("optim.name=m3,adamw", "MODEL:OPTIMIZER"),
        ("optim.levels=[]", "MODEL:OPTIMIZER"),
        (";".join(f"model.a{i}=1,2,3,4" for i in range(5)), "1,024 settings; expected at most 1,000"),
    ],
)
def test_grids_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(text)


def test_settings_are_all_combinations():
    assert settings_of({}) == [{}]
    assert settings_of({"a": [1, 2], "b": [3, 4]}) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="all different"):
        check_grid({"optim.lr": []})


def test_a_setting_changes_what_it_names():
    optim = OptimConfig(options={"a": 1}, weight_decay=0.3)
    one = Contestant("x", "hope-tiny", {"mixer_options": {"titans": {"depth": 2}}}, optim)
    setting = {
        "optim.lr": 0.5,
        "optim.betas": [0.5, 0.6],
        "optim.options.b": 2,
        "model.hidden_size": 8,
        "model.mixer_options.titans.chunk_size": 4,
    }
    other = tuned(one, setting)
    assert (other.optim.lr, other.optim.betas, other.optim.options) == (0.5, (0.5, 0.6), {"a": 1, "b": 2})
    assert other.optim.weight_decay == 0.3
    assert other.overrides == {"hidden_size": 8, "mixer_options": {"titans": {"depth": 2, "chunk_size": 4}}}
    assert (one.optim, one.overrides) == (optim, {"mixer_options": {"titans": {"depth": 2}}})
    assert tuned(one, {}) == one
    with pytest.raises(ValueError, match="weight_decay is -1"):
        tuned(one, {"optim.weight_decay": -1})
    assert [described(v) for v in (3e-3, "x", [1, 2.5], None)] == ["0.003", "x", "[1, 2.5]", "null"]


# The search --------------------------------------------------------------------------------------------


class Told:
    """Rounds whose losses are told by a function, and whose runs take a second each on a clock of its own."""

    def __init__(self, loss, kept=()):
        self.loss, self.kept, self.now, self.asked = loss, kept, 0.0, []
        self.labels, self.skipped = [], 0

    def clock(self):
        return self.now

    def finished(self, contestants, seed):
        return all((each.name, each.optim.lr, seed) in self.kept for each in contestants)

    def skip(self):
        self.skipped += 1

    def run(self, contestants, seed, label):
        self.labels.append(label)
        runs = []
        for each in contestants:
            self.asked.append((each.name, each.optim.lr, seed))
            known = self.asked[-1] in self.kept
            self.now += 0.0 if known else 1.0
            loss = self.loss(each.name, each.optim.lr, seed)
            runs.append({"model": each.name, "lr": each.optim.lr, "seed": seed, "nats_per_token": loss,
                         "bits_per_byte": loss, "median_step_seconds": 0.25})  # fmt: skip
        return runs


RATES = [0.1, 0.2, 0.3, 0.4]


def searched(rounds, minutes=None, seeds=(0, 1), names=("a", "b")):
    contestants = [Contestant(name, "hope-tiny", {}, OptimConfig()) for name in names]
    budget = SearchClock(minutes, 4, rounds.clock)
    return search(contestants, {"optim.lr": RATES}, 9, seeds, rounds, budget)


def test_each_model_takes_its_best_setting_to_the_seeds():
    rounds = Told(lambda name, lr, seed: abs(lr - {"a": 0.2, "b": 0.4}[name]))
    found = searched(rounds)
    assert found.best == {"a": {"optim.lr": 0.2}, "b": {"optim.lr": 0.4}}
    tuning, final = rounds.asked[:8], rounds.asked[8:]
    assert tuning == [(name, lr, 9) for lr in RATES for name in "ab"]
    assert final == [("a", 0.2, 0), ("b", 0.4, 0), ("a", 0.2, 1), ("b", 0.4, 1)]
    assert [(run["model"], run["setting"]["optim.lr"]) for run in found.runs] == [
        (name, lr) for name, lr, _ in final
    ]
    assert (found.cut, found.cut_seeds, found.seconds) == ([], [], 12.0)
    assert rounds.labels == [*(f"setting {n} of 4" for n in range(1, 5)), "seed 1 of 2", "seed 2 of 2"]
    tried = found.settings_of("b")
    assert [each["chosen"] for each in tried] == [False, False, False, True]


def test_the_first_of_equal_settings_is_taken_and_a_diverged_one_is_not():
    found = searched(Told(lambda name, lr, seed: None if lr == 0.1 or name == "b" else 1.0))
    assert found.best == {"a": {"optim.lr": 0.2}, "b": None}
    assert {run["model"] for run in found.runs} == {"a"}
    found = searched(Told(lambda name, lr, seed: None))
    assert (found.runs, found.cut_seeds) == ([], [])


@pytest.mark.parametrize(
    ("seconds", "settings", "seeds"),
    [(0.001, 1, 1), (5.9, 1, 1), (6, 1, 2), (8, 2, 2), (9.9, 2, 2), (11.99, 3, 2), (12, 4, 2), (99, 4, 2)],
)
def test_a_budget_leaves_out_the_same_settings_for_all(seconds, settings, seeds):
    """A round of two models takes two seconds; those of both seeds are kept aside meanwhile."""
    rounds = Told(lambda name, lr, seed: lr)
    found = searched(rounds, seconds / 60)
    for name in "ab":
        assert len(found.settings_of(name)) == settings
    tried = {run["lr"] for run in found.tried}
    assert tried | {setting["optim.lr"] for setting in found.cut} == set(RATES)
    assert len(found.cut) == 4 - settings
    assert len(found.runs) == 2 * seeds
    assert rounds.skipped == 4 - settings + 2 - seeds
    assert found.cut_seeds == [0, 1][seeds:]
    assert found.seconds <= max(seconds, 4)
    assert [run["lr"] for run in found.tried] == sorted(
        run["lr"] for run in found.tried
    )  # in the grid's order


def test_what_is_kept_costs_no_budget():
    """Another call with the same budget goes on where the first one stopped."""
    first = Told(lambda name, lr, seed: lr)
    found = searched(first, 8 / 60)
    assert len(found.cut) == 2
    second = Told(lambda name, lr, seed: lr, kept=set(first.asked))
    found = searched(second, 8 / 60)
    assert found.cut == []
    assert second.now <= 8


@pytest.fixture
def yaml(tiny, tmp_path):
    """The tiny configuration as a YAML file."""
    path = tmp_path / "one.yaml"
    path.write_text(dump_config(tiny()))
    return str(path)


def of_grid(tiny, yaml, **fields):
    base = {
        "steps": 4,
        "batch_size": 4,
        "validation_batches": 2,
        "memory": False,
        "grid": GRID,
        "seeds": [0, 3],
    }
    return CompareConfig(models=[yaml, f"{yaml}:sgd"], data=tiny().data, **{**base, **fields})


def test_runs_of_a_search_are_those_of_a_comparison(tiny, yaml, monkeypatch):
    """At the chosen setting, with the seeds of the comparison, on the same batches."""
    bars = []

    @contextmanager
    def noted(*arguments):
        with progress(*arguments) as bar:
            bars.append(bar)
            yield bar

    monkeypatch.setattr(compare_module, "progress", noted)
    result = compare(of_grid(tiny, yaml))
    steps = 4 * (4 + 2)
    assert [(bar.done, bar.total, bar.what) for bar in bars] == [(steps, steps, "seed 2 of 2")]
    for model in result["models"]:
        assert len(model["settings"]) == 4
        best = min(model["settings"], key=lambda each: each["nats_per_token"])
        assert model["setting"] == best["setting"]
        plain = compare(
            CompareConfig(
                models=[model["model"]], data=tiny().data, lrs=[model["setting"]["optim.lr"]],
                optim=OptimConfig(schedule="linear", weight_decay=model["setting"]["optim.weight_decay"]),
                seeds=[0, 3], steps=4, batch_size=4, validation_batches=2, memory=False,
            )
        )  # fmt: skip
        assert plain["models"][0]["nats_per_token"] == model["nats_per_token"]
        found = [run["train_losses"] for run in result["runs"] if run["model"] == model["model"]]
        assert found == [run["train_losses"] for run in plain["runs"]]
    assert {run["seed"] for run in result["search"]["runs"]} == {1000}
    assert result["config"]["tuning_seed"] == 1000


def test_a_search_goes_on_from_its_cache(tiny, yaml, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = compare(of_grid(tiny, yaml, cache=cache, seeds=[0], grid={"optim.lr": [1e-2, 2e-2]}))
    trained = []
    original = Contender.step
    monkeypatch.setattr(
        Contender, "step", lambda self, batch: (trained.append(self.name), original(self, batch))
    )
    again = compare(
        of_grid(tiny, yaml, cache=cache, seeds=[0], grid={"optim.lr": [1e-2, 2e-2]}, budget_minutes=1e-6)
    )
    assert trained == []
    assert again["runs"] == first["runs"]
    assert again["search"]["cut_settings"] == []
    assert again["search"]["runs"] == first["search"]["runs"]
    compare(of_grid(tiny, yaml, cache=cache, seeds=[0], grid={"optim.lr": [1e-2, 3e-2]}))
    assert set(trained) <= {yaml, f"{yaml}:sgd"}
    assert len(trained) in (8, 12, 16)  # the new setting, and where it is chosen the seed


def test_a_model_that_always_diverges_is_named(tiny, yaml):
    optim = OptimConfig(schedule="linear", max_grad_norm=0.0, warmup_steps=0)
    result = compare(of_grid(tiny, yaml, optim=optim, seeds=[0], grid={"optim.lr": [1e30, 1e31]}, steps=8))
    for model in result["models"]:
        assert (model["setting"], model["nats_per_token"], model["best_lr"]) == (None, None, None)
        assert not any(each["chosen"] for each in model["settings"])
    assert result["runs"] == []


def test_searches_that_are_refused(tiny, yaml):
    for fields, message in (
        ({"grid": {"optim.rate": [1]}}, "unknown key of --grid"),
        ({"grid": {}, "tuning_seed": 5}, "there is no grid"),
        ({"grid": {}, "budget_minutes": 5.0}, "there is no grid"),
        ({"lrs": [1e-2]}, "the rates of a search in the grid itself"),
        ({"grid": {"optim.eps": [1e-8]}, "lrs": [1e-2, 1e-3]}, "in the grid itself"),
        ({"tuning_seed": 3}, "one of seeds"),
        ({"budget_minutes": 0.0}, "a positive number of minutes"),
    ):
        with pytest.raises(ValueError, match=message):
            of_grid(tiny, yaml, **fields)
    for grid, message in (
        ({"optim.lr": [-1.0]}, "optim.lr is -1.0"),
        ({"model.hidden_sizes": [1]}, "Did you mean 'hidden_size'"),
        ({"optim.warmup_steps": [4]}, "fewer than the 4 steps"),
        ({"optim.options.nothing": [1]}, "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(of_grid(tiny, yaml, grid=grid))
