"""compare: equal models get equal losses, and the table says what the runs say."""

import json
import math
from contextlib import contextmanager

import pytest
import torch

from nested_learning import _files
from nested_learning._progress import progress
from nested_learning.training import compare as compare_module
from nested_learning.training.compare import CompareConfig, Contender, compare, summarise
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import dump_config
from nested_learning.training.data import build_data
from nested_learning.training.memory_probe import step_memory
from nested_learning.training.models import model_config, new_model
from nested_learning.training.run import train


@pytest.fixture
def yaml(tiny, tmp_path):
    """A function that writes the tiny configuration, with fields of the model changed, to a YAML file."""

    def write(name, **fields):
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(tiny(model={**tiny().model, **fields})))
        return str(path)

    return write


def test_equal_models_have_equal_losses_and_those_of_train(tiny, yaml, monkeypatch):
    optim, bars = OptimConfig(lr=1e-2), []

    @contextmanager
    def noted(*arguments):
        with progress(*arguments) as bar:
            bars.append(bar)
            yield bar

    monkeypatch.setattr(compare_module, "progress", noted)
    result = compare(
        CompareConfig(
            models=[yaml("one"), yaml("two"), yaml("wide", hidden_size=48)],
            data=tiny().data,
            optim=optim,
            lrs=[1e-2, 2e-2],
            seeds=[0, 3],
            steps=8,
            batch_size=4,
            validation_batches=2,
            memory=False,
        )
    )
    assert [(bar.done, bar.total, bar.unit) for bar in bars] == [(8 * 2 * 2, 8 * 2 * 2, "step")]
    by_model = {}
    for run in result["runs"]:
        by_model.setdefault(run["model"], {})[run["lr"], run["seed"]] = run
    one, two, wide = by_model.values()
    for key in one:
        assert one[key]["train_losses"] == two[key]["train_losses"]
        assert one[key]["nats_per_token"] == two[key]["nats_per_token"]
        assert one[key]["train_losses"] != wide[key]["train_losses"]
    trained = train(tiny(optim=optim)).result
    assert one[1e-2, 0]["train_losses"] == pytest.approx(
        [loss for _, loss in trained["losses"]["train"]], abs=1e-6
    )
    assert one[1e-2, 0]["nats_per_token"] == pytest.approx(
        trained["validation"]["after"]["nats_per_token"], abs=1e-6
    )
    assert [model["model"].rpartition("/")[2] for model in result["models"]] == [
        "one.yaml", "two.yaml", "wide.yaml",
    ]  # fmt: skip
    assert result["models"][2]["relative_speed"] == 1.0


def run_of(model, lr, seed, nats, seconds):
    return {
        "model": model,
        "lr": lr,
        "seed": seed,
        "parameters": 10,
        "nats_per_token": nats,
        "bits_per_byte": None if nats is None else nats / math.log(2),
        "diverged_at": None,
        "median_step_seconds": seconds,
        "train_losses": [],
    }


def test_summary_takes_the_best_mean_and_passes_over_divergence():
    runs = [
        run_of("a", 0.1, 0, 2.0, 0.5), run_of("a", 0.1, 1, 4.0, 0.7),
        run_of("a", 0.2, 0, 1.0, 0.6), run_of("a", 0.2, 1, None, 0.6),
        run_of("b", 0.1, 0, 5.0, 0.2), run_of("b", 0.1, 1, 5.0, 0.2),
        run_of("b", 0.2, 0, 3.0, 0.2), run_of("b", 0.2, 1, 4.0, 0.2),
        run_of("c", 0.1, 0, None, None), run_of("c", 0.2, 0, None, None),
    ]  # fmt: skip
    a, b, c = summarise(runs, 100, {"a": 7, "b": None, "c": None})
    assert (a["best_lr"], a["nats_per_token"], a["step_memory_bytes"]) == (0.1, 3.0, 7)
    assert [rate["diverged"] for rate in a["rates"]] == [0, 1]
    assert (b["best_lr"], b["nats_per_token"], b["tokens_per_second"]) == (0.2, 3.5, 500)
    assert a["median_step_seconds"] == pytest.approx(0.6)
    assert (c["best_lr"], c["nats_per_token"], c["tokens_per_second"], a["relative_speed"]) == (None,) * 4
    a, b = summarise(runs[:8], 100, {"a": None, "b": None})
    assert a["relative_speed"] == pytest.approx(0.2 / 0.6)


def test_a_diverged_model_stands_still(tiny):
    config = tiny()
    bundle = build_data(config.data, 32)
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), 0)
    contender = Contender("x", model, OptimConfig(lr=1e30, max_grad_norm=0.0, warmup_steps=0), 8)
    batches = list(compare_module.batches(bundle.train, 4, torch.device("cpu")))
    for batch in batches:
        contender.step(batch)
    assert contender.diverged_at is not None
    assert len(contender.losses) == contender.diverged_at - 1
    assert all(math.isfinite(loss) for loss in contender.losses)
    assert contender.validate(batches) is None


def test_settings_are_checked(tiny):
    for fields in ({"models": ["a", "a"]}, {"models": ["a"], "lrs": []}, {"models": ["a"], "steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            CompareConfig(**fields)
    for seeds in ([-1], [0, 2**32]):
        with pytest.raises(ValueError, match=rf"^seed is {seeds[-1]}; expected .*Set --seeds accordingly\.$"):
            CompareConfig(models=["a"], seeds=seeds)
    with pytest.raises(ValueError, match=r"^model is \['a', 'a'\]; .* Set the models accordingly\.$"):
        CompareConfig(models=["a", "a"])
    with pytest.raises(ValueError, match=r"ends in a colon; expected MODEL:OPTIMIZER, such as hope-tiny:m3"):
        compare(CompareConfig(models=["hope-tiny:", "transformer-tiny"]))
    with pytest.raises(ValueError, match=r"unknown preset 'hope-tinny'.*YAML"):
        compare(CompareConfig(models=["hope-tinny", "transformer-tiny"]))


@pytest.mark.slow  # two fresh processes
def test_step_memory_grows_with_the_batch(tiny):
    fields = {**tiny().model, "hidden_size": 64, "mixer": "attention", "vocab_size": 258}
    small, large = (step_memory(fields, (rows, 256), "cpu") for rows in (1, 64))
    logits = 64 * 256 * 258 * 4
    assert large > small + logits


def of_cache(tiny, yaml, folder, models, **fields):
    base = {"steps": 4, "batch_size": 4, "validation_batches": 2, "memory": False, "lrs": [1e-2]}
    return CompareConfig(models=models, data=tiny().data, cache=str(folder), **{**base, **fields})


def test_optimizers_are_contestants(tiny, yaml, tmp_path):
    one = yaml("one")
    levels = tmp_path / "levels.yaml"
    optim = OptimConfig(name="m3", levels=[{"part": "cms.0", "period": 2}])
    levels.write_text(dump_config(tiny(optim=optim)))
    models = [one, f"{one}:adamw", f"{one}:m3", str(levels)]
    result = compare(of_cache(tiny, yaml, tmp_path / "cache", models))
    plain, adamw, m3, nested = (run["train_losses"] for run in result["runs"])
    assert [model["model"] for model in result["models"]] == models
    assert plain == adamw
    assert len({tuple(curve) for curve in (plain, m3, nested)}) == 3
    with pytest.raises(ValueError, match="unknown optimizer 'm4'"):
        compare(of_cache(tiny, yaml, tmp_path / "cache", [one, f"{one}:m4"]))


def test_a_cache_that_cannot_be_written_is_noticed_before_the_first_run(tiny, yaml, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Contender, "step", lambda self, batch: pytest.fail("a step"))

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(ValueError, match="results are kept in a folder"):
        compare(of_cache(tiny, yaml, tmp_path / "file", [yaml("one")]))
    monkeypatch.setattr(_files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written: Permission denied .* Choose another --cache"):
        compare(of_cache(tiny, yaml, tmp_path / "cache", [yaml("one")]))
    with pytest.raises(ValueError, match="cache is ''; expected the path of a folder"):
        of_cache(tiny, yaml, "", [yaml("one")])


def test_finished_runs_are_kept_and_no_others_are_taken_for_them(tiny, yaml, tmp_path, monkeypatch):
    one, two = yaml("one"), yaml("two", hidden_size=48)
    cache = tmp_path / "cache"
    first = compare(of_cache(tiny, yaml, cache, [one, two]))
    trained = []
    original = Contender.step
    monkeypatch.setattr(
        Contender, "step", lambda self, batch: (trained.append(self.name), original(self, batch))
    )
    again = compare(of_cache(tiny, yaml, cache, [one, two]))
    assert trained == []
    assert again["runs"] == first["runs"]
    more = compare(of_cache(tiny, yaml, cache, [one, two, f"{one}:sgd"]))
    assert set(trained) == {f"{one}:sgd"}
    assert more["runs"][:2] == first["runs"]
    for fields in ({"steps": 5}, {"seeds": [1]}, {"lrs": [2e-2]}, {"batch_size": 2}):
        trained.clear()
        compare(of_cache(tiny, yaml, cache, [one], **fields))
        assert set(trained) == {one}, fields
    trained.clear()
    for file in cache.glob("*.json"):
        file.write_text(file.read_text()[:-9])
    with pytest.warns(RuntimeWarning, match="is passed over"):
        damaged = compare(of_cache(tiny, yaml, cache, [one, two]))
    assert set(trained) == {one, two}
    assert [run["train_losses"] for run in damaged["runs"]] == [run["train_losses"] for run in first["runs"]]
    trained.clear()
    for file in cache.glob("*.json"):
        try:
            kept = json.loads(file.read_text())
        except ValueError:
            continue
        del kept["result"]["nats_per_token"]
        file.write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match="is passed over: its nats_per_token is missing"):
        compare(of_cache(tiny, yaml, cache, [one, two]))
    assert set(trained) == {one, two}
