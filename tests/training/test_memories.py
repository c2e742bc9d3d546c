"""The record of the memories in a run: what it says, that nothing else changes, that it goes on."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nested_learning import HopeForCausalLM, HopeModel
from nested_learning.lens import record
from nested_learning.models import preset
from nested_learning.training.data import build_data
from nested_learning.training.memories import look, plot_memories, read_memories, summary, text_of
from nested_learning.training.run import train

TITANS = {"mixer": "self_modifying_titans", "mixer_options": {"self_modifying_titans": {"chunk_size": 8}}}


@pytest.fixture
def watched(tiny):
    """A function that gives the configuration of a tiny run of self-modifying Titans with a record."""

    def config(**fields):
        model = {**tiny().model, **TITANS, **fields.pop("model", {})}
        return tiny(**{"model": model, "memory_tokens": 40, "eval_every": 4, **fields})

    return config


def scalars(folder):
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_run_writes_its_record(watched, drawn, tmp_path):
    outcome = train(watched())
    folder = outcome.folder
    lines = read_memories(folder.memories)
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert folder.memories_plot.read_bytes()[:4] == b"\x89PNG"
    assert outcome.result["files"]["memories"] == str(folder.memories)
    first, last = lines[0]["layers"][0], lines[-1]["layers"][0]
    assert (last["name"], last["kind"]) == ("layers.0.mixer", "SelfModifyingTitans")
    assert last["memories"] == ["k", "v", "eta", "alpha", "memory"]
    assert np.shape(last["distance"]) == np.shape(last["initial_norm"]) == (5, 2)
    assert np.min(last["distance"]) > 0  # every memory learned something of the text
    assert {name: len(heads) for name, heads in last["singular_values"].items()} == {"W1": 2, "W2": 2}
    assert len(last["eta"]) == len(last["alpha"]) == 2
    assert all(0 < value < 1 for value in [*last["eta"], *last["alpha"]])
    assert last["mu"] is None
    assert first["initial_norm"] != last["initial_norm"]  # training moved the start itself
    board = scalars(folder.tensorboard)
    few = summary(last)
    for name in ("distance", "distance, generating", "initial norm", "singular value", "eta", "recall"):
        points = board[f"memories/layers.0.mixer/{name.replace(',', '').replace(' ', '_')}"]
        assert [step for step, _ in points] == [0, 4, 8]
        assert points[-1][1] == pytest.approx(few[name], rel=1e-5)


def test_the_last_line_is_what_the_lens_sees(watched):
    """Of the trained model, with the same text."""
    outcome = train(watched())
    model = HopeForCausalLM.from_pretrained(outcome.folder.model)
    bundle = build_data(watched().data, 32, 4)
    trace = record(model, text_of(bundle.validation, 40)).memories[0]
    line = read_memories(outcome.folder.memories)[-1]["layers"][0]
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(line["distance"], trace.distance[-1], **close)
    np.testing.assert_allclose(line["eta"], trace.eta.mean(0), **close)
    np.testing.assert_allclose(line["alpha"], trace.alpha.mean(0), **close)
    np.testing.assert_allclose(line["singular_values"]["W1"], trace.singular_values["W1"][-1], **close)
    assert line["surprise"] == pytest.approx(trace.surprise.mean(), rel=1e-4)
    assert line["recall"] == pytest.approx(trace.recall[-1].mean(), rel=1e-3, abs=1e-4)


def test_the_run_itself_stays_as_it_is(watched, tmp_path):
    with_record = train(watched(output=str(tmp_path / "a"))).result
    without = train(watched(output=str(tmp_path / "b"), memory_tokens=0))
    assert with_record["losses"] == without.result["losses"]
    assert not without.folder.memories.exists()
    assert not without.folder.memories_plot.exists()
    assert without.result["files"]["memories"] is None


def test_a_resumed_run_goes_on_with_its_record(watched, tmp_path, monkeypatch):
    whole = train(watched(output=str(tmp_path / "whole"), save_every=2))
    config = watched(output=str(tmp_path / "cut"), save_every=2)
    from nested_learning.training.trainer import HopeTrainer

    original = HopeTrainer.training_step

    def step_and_stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HopeTrainer, "training_step", step_and_stop)
    cut = train(config)
    assert cut.result is None
    assert [line["step"] for line in read_memories(cut.folder.memories)] == [0, 4]
    monkeypatch.undo()
    # as if a later evaluation had been written before the run was killed: it is read again
    late = {**read_memories(cut.folder.memories)[-1], "step": 7}
    with open(cut.folder.memories, "a") as file:
        file.write(json.dumps(late) + "\n")
    resumed = train(config, resume=True)
    assert read_memories(resumed.folder.memories) == read_memories(whole.folder.memories)


def test_a_new_run_in_its_place_has_a_new_record(watched):
    train(watched())
    again = train(watched(memory_tokens=0), overwrite=True)
    assert not again.folder.memories.exists()
    assert not again.folder.memories_plot.exists()


@pytest.mark.parametrize("mixer", ["titans", "gated_deltanet", "mag", "mac"])
@pytest.mark.parametrize("update", ["none", "lm"])
def test_every_kind_of_memory_is_looked_at(mixer, update):
    small = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "mixer": mixer, "mixer_options": {}}
    config = preset("hope-tiny", **small, cms_levels=[{"chunk_size": 8}], cms_update=update)
    torch.manual_seed(0)
    model = HopeForCausalLM(config).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    layers = look(model, torch.arange(70) % 256)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert len(layers) == 2
    for layer in layers:
        few = summary(layer)
        assert few["distance"] > 0
        assert few["singular value"] > 0
        json.dumps(layer, allow_nan=False)


def test_what_is_not_finite_is_none():
    config = preset("hope-tiny", hidden_size=16, num_heads=2, num_hidden_layers=1)
    model = HopeForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mixer.initial.get_parameter("W1").fill_(torch.nan)
    [layer] = look(model, torch.arange(20))
    json.dumps(layer, allow_nan=False)
    few = summary(layer)
    assert few["distance"] is None
    assert few["singular value"] is None


def test_a_picture_of_two_lines(tmp_path, drawn):
    model = HopeForCausalLM(preset("titans-tiny", hidden_size=16, num_heads=2, num_hidden_layers=1))
    layers = look(model, torch.arange(20))
    plot_memories(tmp_path / "a.png", [{"step": s, "tokens": 20, "layers": layers} for s in (0, 5)])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_it_is_refused_where_it_says_nothing(tiny, watched, monkeypatch):
    with pytest.raises(ValueError, match="memory_tokens is 1; expected 0, or 2"):
        watched(memory_tokens=1)
    with pytest.raises(ValueError, match=r"no block has one \(mixers: attention\)"):
        train(tiny(memory_tokens=40))
    with pytest.raises(ValueError, match=r"memory_tokens is 129, but the validation text has 128 tokens"):
        train(watched(memory_tokens=129))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    from nested_learning.training.memories import check_memories

    with pytest.raises(ValueError, match="FSDP has shards"):
        check_memories(HopeForCausalLM(preset("titans-tiny", hidden_size=16, num_heads=2)))


def test_nothing_was_written_where_it_is_refused(watched, tmp_path):
    with pytest.raises(ValueError, match="memory_tokens"):
        train(watched(memory_tokens=10_000))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"step": "x", "layers": []}', '{"step": 1}', '{"step": 1, "layers": [{}]}']
)
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "memories.jsonl"
    path.write_text('{"step": 0, "layers": []}\n' + text + "\n")
    with pytest.raises(ValueError, match=r"memories.jsonl is damaged in line 2 .*remove the file"):
        read_memories(path)


def test_a_model_without_a_head_has_the_same_record():
    model = HopeForCausalLM(preset("titans-tiny", hidden_size=16, num_heads=2, num_hidden_layers=1))
    bare = model.model
    assert isinstance(bare, HopeModel)
    assert look(bare, torch.arange(30)) == look(model, torch.arange(30))
