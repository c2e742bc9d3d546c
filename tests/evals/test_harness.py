"""lm-eval as a task, without lm-eval: what it is given and what is read from its results."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from nested_learning.evals import TUNING_SEED, find_method, find_task
from nested_learning.evals.tasks.harness import sources
from nested_learning.evals.tasks.harness.task import figures_of
from nested_learning.training.data import byte_tokenizer

LINE = {"context": "the last word of this is", "continuation": "this"}


def task(**options):
    return find_task("lm_eval").at("small", **{"model": "random", **options})


@pytest.fixture
def lambada(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(tmp_path))
    path = tmp_path / sources.LAMBADA_FILE
    path.write_text(json.dumps(LINE) + "\n")
    return path


def test_figures_are_named_by_task_and_groups_do_not_count():
    found = figures_of(
        {
            "results": {
                "a": {
                    "alias": "a",
                    "ppl,none": 3.0,
                    "acc,none": 0.5,
                    "acc_stderr,none": "N/A",
                    "acc,cut": 0.25,
                },
                "b": {"alias": "b", "acc_norm,none": 1.0, "acc,none": 0.75, "bits_per_byte,none": 2.0},
                "c": {"alias": "c", "bits_per_byte,none": 4.0, "perplexity,none": 8.0},
                "of_all": {"alias": "of all", "acc,none": 0.625},
            },
            "higher_is_better": {
                "a": {"ppl": False, "acc": True},
                "b": {"acc": True, "acc_norm": True, "bits_per_byte": False},
                "c": {"bits_per_byte": False, "perplexity": False},
                "of_all": {"acc": True},
            },
            "n-samples": {"a": {}, "b": {}, "c": {}},
        }
    )
    assert found["accuracy"] == (0.5 + 1.0) / 2
    assert found["bits_per_byte"] == 3.0
    assert found["perplexity"] == 8.0
    assert found["a acc,cut"] == 0.25
    assert found["of_all acc"] == 0.625
    assert "word_perplexity" not in found
    assert not [name for name in found if "stderr" in name or "alias" in name]


def test_each_run_has_documents_of_its_own_and_tuning_the_last():
    documents = {"t": SimpleNamespace(eval_docs=range(20))}
    chosen = [task(limit=5, seeds=3)._documents(documents, seed)["t"] for seed in (0, 1, 2, TUNING_SEED)]
    assert chosen == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    assert task(limit=0)._documents(documents, 0) is None
    with pytest.raises(ValueError, match="t has 20 documents; run 3 of 5 each, the last ones kept"):
        task(limit=5)._documents(documents, 3)
    assert task(limit=5, lrs=[0.1])._documents(documents, 3)["t"] == [15, 16, 17, 18, 19]  # nothing is tuned


def test_rates_are_tuned_where_levels_learn_and_documents_are_left():
    plain, learning = find_method("as-it-is"), find_method("learning-two-levels")
    assert task().grid(plain) == [{}]
    assert [each["lr"] for each in task(lrs=[0.1, 0.2]).grid(learning)] == [0.1, 0.2]
    assert len(task(limit=0).grid(learning)) == 1
    levels = learning.at({"lr": 0.2}).levels()
    assert [(level.chunk_size, level.lr) for level in levels] == [(64, 0.2), (256, 0.2)]
    assert not plain.levels()


def test_what_is_missing_is_said(lambada, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "nested-learning-torch[eval]" in task().missing()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert task().missing() is None
    assert "set the option `model`" in task(model="").missing()
    assert "no config.json" in task(model=str(tmp_path)).missing()
    assert "neither a folder" in task(model="nobody/nothing").missing()
    lambada.unlink()
    assert sources.LAMBADA_FILE in task().missing()
    assert task(tasks=["piqa"]).missing() is None


@pytest.mark.parametrize("line", ["no json", '{"context": "a"}', '["context"]'])
def test_a_damaged_line_is_named(lambada, line):
    lambada.write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2: expected an object with the texts"):
        sources.task_specs(["lambada"], SimpleNamespace(all_tasks=[]))


def test_unknown_tasks_are_refused_with_the_nearest(tmp_path):
    manager = SimpleNamespace(all_tasks=["piqa", "hellaswag"])
    assert sources.task_specs(["piqa"], manager) == ["piqa"]
    with pytest.raises(ValueError, match="hellaswag"):
        sources.task_specs(["helaswag"], manager)
    with pytest.raises(ValueError, match="no task file"):
        sources.task_specs([str(tmp_path / "mine.yaml")], manager)


def test_models_by_name_and_from_a_folder(tmp_path):
    model, tokenizer = sources.load_model("random", "auto")
    state = torch.random.get_rng_state()
    again, _ = sources.load_model("random", "auto")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    saved, _ = sources.load_model(str(tmp_path), "auto")
    assert saved.dtype == torch.float16
    assert sources.load_model(str(tmp_path), "float32")[0].dtype == torch.float32
    assert not saved.training
    assert tokenizer.encode("a") == [97]
    with pytest.raises(ValueError, match="neither a folder"):
        sources.load_model("nobody/nothing", "auto")
