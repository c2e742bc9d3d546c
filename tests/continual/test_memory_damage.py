"""Damaged memory files: a ValueError with a sentence, and nothing changed; or it works and round-trips."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning.continual import Level
from nested_learning.optimizers import AdaGradMemory
from tests.continual.test_invariances import LEVELS, assert_equal_contents, contents, learner_on
from tests.continual.tiny_models import VOCAB, random_ids, tiny_model
from tests.damage import check_refusal, damaged_bytes, damaged_content, read_file, write_checked

SLOW = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
FAST = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
DOWN = "0/2/delta/model.layers.0.mlp.up_proj.weight:down"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tensors and metadata of a memory in the middle of all its chunks, and the file."""
    learner = learner_on()
    learner.observe(random_ids(37), learn_mask=random_ids(37, seed=3) > 9)
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    learner.memory.save(path)
    return path, *read_file(path)


def load_or_refuse(path):
    """Load a file into a memory that has something in it; after a refusal all is as it was."""
    learner = learner_on()
    learner.observe(random_ids(9, seed=5))
    before, written = contents(learner), path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an old file's
            learner.memory.load(path)
    except ValueError as error:
        check_refusal(error, path)
        assert_equal_contents(contents(learner), before)
        assert path.read_bytes() == written
        return False
    again = path.with_name("again")
    learner.memory.save(again)
    other = learner_on()
    other.memory.load(again)
    assert len(other.memory.rows) == len(learner.memory.rows)
    for row in range(len(learner.memory.rows)):
        assert [str(t) for t in contents(other, row)] == [str(t) for t in contents(learner, row)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a write that was dropped
        learner.observe(random_ids(len(learner.memory.rows), 20, seed=7))
    return True


def fuzz_bytes(saved, data):
    path = saved[0].with_name("damaged")
    path.write_bytes(data.draw(damaged_bytes(saved[0].read_bytes())))
    if load_or_refuse(path):  # bits that say nothing: of a bool, of metadata that nobody reads
        loaded, right = learner_on(), learner_on()
        loaded.memory.load(path)
        right.memory.load(saved[0])
        assert_equal_contents(contents(loaded), contents(right))


def fuzz_content(saved, data):
    tensors, metadata = dict(saved[1]), dict(saved[2])
    if data.draw(st.booleans(), label="of the version without checksums"):
        metadata = {k: v for k, v in metadata.items() if k not in ("sha256", "checked")} | {"version": "1"}
    path = saved[0].with_name("damaged")
    write_checked(path, *data.draw(damaged_content(tensors, metadata)))
    load_or_refuse(path)


@FAST
@given(data=st.data())
def test_damaged_bytes(saved, data):
    fuzz_bytes(saved, data)


@FAST
@given(data=st.data())
def test_damaged_content_with_the_right_checksum(saved, data):
    fuzz_content(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage_to_bytes(saved, data):
    fuzz_bytes(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage_to_content(saved, data):
    fuzz_content(saved, data)


def test_every_flipped_bit_is_seen(saved):
    """One bit of each of 60 bytes, header and data. (The byte of a bool has bits that say nothing.)"""
    path, content = saved[0].with_name("flipped"), saved[0].read_bytes()
    learner, right = learner_on(), learner_on()
    right.memory.load(saved[0])
    refused = 0
    for i in range(60):
        at = i * (len(content) - 1) // 59
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << i % 8]) + content[at + 1 :])
        learner.memory.reset()
        try:
            learner.memory.load(path)
        except ValueError as error:
            check_refusal(error, path)
            assert learner.memory.is_empty
            refused += 1
        else:
            assert_equal_contents(contents(learner), contents(right))
    assert refused >= 59


def rows(metadata, change):
    numbers = json.loads(metadata["rows"])
    change(numbers)
    metadata["rows"] = json.dumps(numbers)


def level(index, **fields):
    return lambda t, m: rows(m, lambda r: r[0]["levels"][index].update(fields))


def row(**fields):
    return lambda t, m: rows(m, lambda r: r[0].update(fields))


def cut(name, change):
    return lambda t, m: t.update({name: change(t[name]).contiguous()})


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row(position=-5), "position is -5"),
        (row(position=36.5), "position is 36.5"),
        (row(position=True), "position is True"),
        (row(position=10**12), "where this learner makes no pause|past the segment"),
        (row(position=10**16), "position is 10000"),
        (row(position=38), "no pause|past the segment"),
        (row(start=-1), "start is -1"),
        (row(start=10**12), "start is 10000"),
        (row(context_layers=1), "1 layers"),
        (row(context_layers=9), "context_layers is 9"),
        (row(levels=[]), r"levels is \[\]"),
        (lambda t, m: m.update(rows="[]"), r"rows is \[\]"),
        (lambda t, m: m.update(rows="7"), "rows is 7"),
        (lambda t, m: m.update(rows="[" * 100_000), "damaged"),
        (lambda t, m: rows(m, lambda r: r.append(r[0])), "1/tokens is missing"),
        (lambda t, m: rows(m, lambda r: r[0].update(more=1)), "expected the fields"),
        (level(0, pairs=-1), "pairs is -1"),
        (level(0, pairs=10**12), "pairs is 10000"),
        (level(1, loss="five"), "loss is 'five'"),
        (level(1, loss=5.0), r"loss is 5\.0"),
        (level(1, loss="-3.0"), "loss is '-3.0'"),
        (level(0, history="none"), "history is 'none'"),
        (level(0, history=[1.0] * 65), "history is"),
        (level(0, history=[-1.0]), "history is"),
        (level(1, history=[1.0]), "history is"),
        (level(0, rule=["speed"]), "rule has the fields"),
        (level(0, rule="momentum"), "rule has the fields"),
        (cut("0/tokens", lambda t: t + VOCAB), "vocabulary"),
        (cut("0/tokens", lambda t: t - VOCAB), "vocabulary"),
        (cut("0/tokens", lambda t: t[None]), r"0/tokens is torch.int64 \[1"),
        (cut("0/tokens", lambda t: t.float()), "0/tokens is torch.float32"),
        (cut("0/tokens", lambda t: t.repeat(9)), "n at most 24"),
        (cut("0/mask", lambda t: t[:-1]), "0/mask is"),
        (cut("0/mask", lambda t: t.long()), "0/mask is torch.int64"),
        (cut("0/keys/0", lambda t: t[..., 1:, :]), "its context has"),
        (cut("0/keys/0", lambda t: t[0]), "0/keys/0 is"),
        (cut("0/values/1", lambda t: t[..., :1]), "0/values/1 is"),
        (cut("0/values/1", lambda t: t.to(torch.complex64)), "0/values/1 is torch.complex64"),
        (cut("0/values/1", lambda t: t.long()), "0/values/1 is torch.int64"),
        (cut(DOWN, lambda t: t.to(torch.int32)), "torch.int32"),
        (cut(DOWN, lambda t: t.mT), "expected bfloat16 or float32 or float64 of shape"),
        (lambda t, m: t.pop(DOWN), "one of the two factors"),
        (lambda t, m: t.pop(next(k for k in t if "/rule/mean/" in k)), "mean.* is missing"),
        (lambda t, m: t.update(more=torch.ones(1)), "unexpected tensors more"),
    ],
)
def test_each_field(saved, change, message, old):
    """Whether there is a checksum, and it is right, or none."""
    tensors, metadata = dict(saved[1]), dict(saved[2])
    if old:
        metadata = {k: v for k, v in metadata.items() if k not in ("sha256", "checked")} | {"version": "1"}
    change(tensors, metadata)
    path = saved[0].with_name("changed")
    write_checked(path, tensors, metadata)
    learner = learner_on()
    learner.observe(random_ids(9, seed=5))
    before = contents(learner)
    with pytest.raises(ValueError, match=message) as error:
        learner.memory.load(path)
    check_refusal(error.value, path)
    assert_equal_contents(contents(learner), before)


CHOICES = {
    "some": LEVELS,
    "gd": (Level(4, 0.3), Level(8, 0.1, gate=0.5), Level(16, 0.0, consolidate=0.2)),
    "averages": (
        Level(4, 0.3, rule="adam", sparse=0.1),
        Level(8, average_of=0, rate=0.5),
        Level(9, 0.1, rank=2, learn_down=False, rule="momentum"),
        Level(18, average_of=2, rate=0.5),
    ),
    "taking over at a rank": (
        Level(4, 0.3, rank=2, rule="rms", decay=0.1),
        Level(8, 0.0, consolidate=0.4, rank=3),
    ),
    "m3": (Level(2, 0.3, rule="m3"), Level(6, 0.1, rule=AdaGradMemory(), rank=1), Level(9, 0.1, rule="m3")),
}


@settings(max_examples=15, deadline=None)
@given(
    levels=st.sampled_from(sorted(CHOICES)),
    family=st.sampled_from(["llama", "gpt2", "mistral"]),
    pieces=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    window=st.integers(14, 30),
    segment=st.sampled_from([None, 3]),
)
def test_whatever_was_saved_loads(tmp_path_factory, levels, family, pieces, window, segment):
    """At any place in the text, for any rule, with whatever family of models: no honest file is refused."""
    path = tmp_path_factory.mktemp("honest") / "memory"
    model = tiny_model(family)
    first, second = (
        learner_on(model, CHOICES[levels], window=window, overlap=5, segment=segment) for _ in range(2)
    )
    for i, piece in enumerate(pieces):
        first.observe(random_ids(piece, seed=i), learn_mask=random_ids(piece, seed=i + 50) > 9)
        first.memory.save(path)
        second.memory.load(path)
        assert_equal_contents(contents(second), contents(first))
