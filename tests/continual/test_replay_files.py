"""The store in memory files: whole after loading, checked, and absent where nothing is kept."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from nested_learning.continual import Level, Replay, stack_levels
from tests.continual.test_invariances import MODEL, assert_equal_contents, contents
from tests.continual.test_replay_forget import SMALL, WHOLE, learner_of, read
from tests.continual.test_replay_learning import listed, store_of
from tests.continual.tiny_models import VOCAB, random_ids
from tests.damage import check_refusal, damaged_content, read_file, write_checked

FAST = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A memory whose store is whole, in the middle of a segment: its path, tensors, metadata, and learner."""
    learner = read(learner_of())
    path = tmp_path_factory.mktemp("replay") / "memory.safetensors"
    learner.memory.save(path)
    return path, *read_file(path), learner


@pytest.mark.parametrize("replay", [WHOLE, SMALL])
def test_reading_goes_on_as_if_nothing_had_happened(tmp_path, replay):
    learner, loaded = read(learner_of(replay)), learner_of(replay)
    learner.memory.save(tmp_path / "m")
    loaded.memory.load(tmp_path / "m")
    assert listed(store_of(loaded)) == listed(store_of(learner))
    for each in (learner, loaded):
        each.observe(random_ids(30, seed=9), source="a", label="x")
    assert listed(store_of(loaded)) == listed(store_of(learner))
    assert_equal_contents(contents(loaded), contents(learner))


@settings(max_examples=7, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    replay=st.sampled_from([WHOLE, SMALL]),
    data=st.data(),
)
def test_whatever_was_saved_loads(tmp_path_factory, lengths, replay, data):
    path = tmp_path_factory.mktemp("honest") / "memory"
    learner, loaded = (learner_of(replay, [Level(8, 0.1), Level(20, 0.1)]) for _ in range(2))
    for i, length in enumerate(lengths):
        names = {"source": data.draw(st.sampled_from(["a", "ä", None])), "label": data.draw(st.booleans())}
        names["label"] = "x" if names["label"] else None
        learner.observe(random_ids(length, seed=i), **names)
        if len(learner.sources()) > 1 and data.draw(st.booleans(), label="forget"):
            learner.forget(learner.sources()[0].name)
        learner.memory.save(path)
        loaded.memory.load(path)
        assert listed(store_of(loaded)) == listed(store_of(learner))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, torch.uint16), (70_000, torch.int32)])
def test_ids_of_a_larger_vocabulary(tmp_path, vocab_size, dtype):
    """The highest ids survive replay and file, in the smallest dtype that holds them."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    learner, loaded = (
        stack_levels(model, levels=[Level(8, 0.1)], replay=Replay(tokens=64, piece=12)) for _ in range(2)
    )
    ids = vocab_size - 1 - torch.arange(32)
    learner.observe(ids, source="a")
    assert learner.writes[-1].replayed
    learner.memory.save(tmp_path / "m")
    tensors, _ = read_file(tmp_path / "m")
    assert tensors["0/store/tokens"].dtype == dtype
    loaded.memory.load(tmp_path / "m")
    assert listed(store_of(loaded)) == listed(store_of(learner))
    assert torch.equal(torch.cat([e.tokens.long() for e in store_of(loaded).examples]), ids)


def test_settings_may_change_between_files(saved):
    """The store is what was read; how it is replayed is the learner's business."""
    other = learner_of(Replay(tokens=40, share=0.1, choose="label", piece=5))
    other.memory.load(saved[0])
    assert listed(store_of(other)) == listed(store_of(saved[3]))
    other.observe(random_ids(30))
    assert store_of(other).tokens <= 40


class TestPrivacy:
    def tokens_in(self, path):
        """All numbers of all tensors of whole numbers in a file."""
        tensors, metadata = read_file(path)
        whole = [t.long() for t in tensors.values() if not t.is_floating_point() and t.dtype != torch.bool]
        return set(torch.cat([t.reshape(-1) for t in whole]).tolist()), str(metadata)

    def test_without_replay_a_file_has_the_tokens_of_the_window_alone(self, tmp_path):
        canary, others = torch.arange(50, 58), random_ids(60) % 40
        for replay in (None, WHOLE):
            learner = stack_levels(MODEL, levels=[Level(8, 0.1)], window=24, overlap=5, replay=replay)
            learner.observe(canary)
            learner.observe(others)
            learner.memory.save(tmp_path / "m")
            numbers, metadata = self.tokens_in(tmp_path / "m")
            assert (set(canary.tolist()) <= numbers) == (replay is not None)
            assert ("store" in metadata) == (replay is not None)
            if replay is None:
                tensors, _ = read_file(tmp_path / "m")
                assert torch.equal(tensors["0/tokens"], others[-len(tensors["0/tokens"]) :])
                assert not [name for name in tensors if "store" in name]

    def test_a_forgotten_source_is_in_no_tensor_and_no_field(self, tmp_path):
        learner = learner_of()
        learner.observe(torch.arange(50, 58), source="canary")
        learner.observe(random_ids(40) % 40, source="a")
        learner.forget("canary")
        learner.memory.save(tmp_path / "m")
        numbers, metadata = self.tokens_in(tmp_path / "m")
        assert not numbers & set(range(50, 58))
        assert "canary" not in metadata

    def test_a_learner_that_keeps_nothing_refuses_a_store_until_it_is_dropped(self, saved, tmp_path):
        plain = learner_of(None)
        with pytest.raises(ValueError, match=r"this learner does not.*drop_stores"):
            plain.memory.load(saved[0])
        assert plain.memory.is_empty
        learner = learner_of()
        learner.memory.load(saved[0])
        learner.memory.drop_stores()
        learner.memory.save(tmp_path / "m")
        plain.memory.load(tmp_path / "m")
        assert_equal_contents(contents(plain), contents(saved[3]))
        for each in (plain, learner):
            each.observe(random_ids(30, seed=3))
        assert_equal_contents(contents(plain), contents(learner))


def fields(**changes):
    def change(tensors, metadata):
        rows = json.loads(metadata["rows"])
        rows[0]["store"].update(changes)
        metadata["rows"] = json.dumps(rows)

    return change


def cut(name, change):
    return lambda t, m: t.update({f"0/store/{name}": change(t[f"0/store/{name}"]).contiguous()})


def put(name, index, value):
    return lambda t, m: t[f"0/store/{name}"].__setitem__(index, value)


def without_store(tensors, metadata):
    rows = json.loads(metadata["rows"])
    del rows[0]["store"]
    metadata["rows"] = json.dumps(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fields(more=1), "0/store is"),
        (fields(reason="bored"), "reason is 'bored'"),
        (fields(reason=["dropped"]), "reason is"),
        (fields(sources=5), "sources is 5"),
        (fields(sources=[["a", 1]]), "sources is"),
        (fields(sources=[["a", -1, 0]]), "sources has -1"),
        (fields(sources=[["a", 10**9, 0]]), "more tokens than"),
        (fields(sources=[["a", 1, 0], ["a", 1, 0]]), "none of them twice"),
        (fields(sources=[[["a"], 1, 0]]), "expected a list of names"),
        (fields(sources=[["", 1, 0]]), "expected a list of names"),
        (fields(sources=[["a", 1, 0]]), "source has|runs has"),
        (fields(labels="x"), "labels is 'x'"),
        (fields(labels=[]), "runs has|label has"),
        (fields(runs=[]), "runs is"),
        (fields(runs=7), "runs is 7"),
        (fields(runs=[[0, 0]]), "runs is"),
        (fields(runs=[[0, 9, 0]]), "runs has 9"),
        (fields(runs=[[10**6, 0, 0]]), "runs has 1000000"),
        (fields(runs=[[9, 0, 0], [5, 0, 0]]), "ascending"),
        (fields(runs=[[85, 0, 0]]), "the first by"),
        (cut("length", lambda t: t[:-1]), "values, expected as many"),
        (put("length", 1, 0), "length has 0"),
        (put("length", 1, 99), "length has 99"),
        (cut("length", lambda t: t.long()), "0/store/length is torch.int64"),
        (put("start", 1, -3), "start has -3"),
        (put("start", 1, 2), "overlap"),
        (put("start", 0, 1), "overlap|gaps"),
        (put("source", 2, 7), "source has 7"),
        (put("label", 2, -1), "label has -1"),
        (put("loss", 0, -1.0), "loss has -1"),
        (put("tokens", 0, VOCAB), "outside the vocabulary"),
        (cut("tokens", lambda t: t[:-1]), "0/store/tokens is"),
        (cut("tokens", lambda t: t.to(torch.int32)), "0/store/tokens is torch.int32"),
        (cut("mask", lambda t: t.to(torch.uint8)), "0/store/mask is torch.uint8"),
        (lambda t, m: t.pop("0/store/mask"), "0/store/mask is missing"),
        (lambda t, m: t.pop("0/store/length"), "gaps"),
        (without_store, "unexpected tensors"),
    ],
)
def test_each_field(saved, change, message):
    tensors, metadata = {name: t.clone() for name, t in saved[1].items()}, dict(saved[2])
    change(tensors, metadata)
    path = saved[0].with_name("changed")
    write_checked(path, tensors, metadata)
    learner = learner_of()
    learner.observe(random_ids(9, seed=5), source="z")
    before, kept = contents(learner), listed(store_of(learner))
    with pytest.raises(ValueError, match=message) as error:
        learner.memory.load(path)
    check_refusal(error.value, path)
    assert_equal_contents(contents(learner), before)
    assert listed(store_of(learner)) == kept


def damage(saved, data):
    """A ValueError with a sentence, and nothing changed; or it works, goes on, forgets and round-trips."""
    tensors = {name: t for name, t in saved[1].items() if "/store/" in name or name.count("/") == 1}
    left = {name: t for name, t in saved[1].items() if name not in tensors}
    tensors, metadata = data.draw(damaged_content(tensors, dict(saved[2])))
    path = saved[0].with_name("damaged")
    write_checked(path, {**left, **tensors}, metadata)
    learner = learner_of()
    learner.observe(random_ids(9, seed=5), source="z")
    before = listed(store_of(learner))
    try:
        learner.memory.load(path)
    except ValueError as error:
        check_refusal(error, path)
        assert listed(store_of(learner)) == before
        return
    if learner.sources():
        learner.forget(learner.sources()[0].name)
    learner.observe(random_ids(len(learner.memory.rows), 20, seed=7))
    learner.memory.save(path.with_name("again"))
    other = learner_of()
    other.memory.load(path.with_name("again"))
    assert listed(store_of(other)) == listed(store_of(learner))


@FAST
@given(data=st.data())
def test_damaged_content_with_the_right_checksum(saved, data):
    damage(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage(saved, data):
    damage(saved, data)
