"""Memory files of levels that re-read and distil: honest ones load at any place, damaged ones are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning.continual import Level, stack_levels
from tests.continual.test_invariances import assert_equal_contents
from tests.continual.test_objectives_distil import everything
from tests.continual.tiny_models import random_ids, tiny_model
from tests.damage import check_refusal, damaged_content, read_file, write_checked

MODEL = tiny_model()
LEVELS = (Level(4, 0.3, reread=1), Level(21, 0.2, rank=1, distill=1.0, reread=1))
SLOW = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
FAST = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def learner_on(window=18, overlap=5):
    return stack_levels(MODEL, levels=LEVELS, segment=3, window=window, overlap=overlap, distill_top_k=5)


@FAST
@given(pieces=st.lists(st.integers(1, 23), min_size=1, max_size=3), window=st.integers(12, 30))
def test_whatever_was_saved_loads(tmp_path_factory, pieces, window):
    path = tmp_path_factory.mktemp("honest") / "memory"
    first, second = (learner_on(window) for _ in range(2))
    for i, piece in enumerate(pieces):
        first.observe(random_ids(piece, seed=i), learn_mask=random_ids(piece, seed=i + 50) > 9)
        first.memory.save(path)
        second.memory.load(path)
        assert_equal_contents(everything(second), everything(first))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A memory with answers, tokens to read again and distilled gradients: its file, tensors, metadata."""
    learner = learner_on()
    learner.observe(random_ids(37))
    path = tmp_path_factory.mktemp("memory") / "memory"
    learner.memory.save(path)
    tensors, metadata = read_file(path)
    kinds = ("answers/ids", "answers/rest", "0/read", "1/read_mask", "1/distilled")
    assert all(any(name.startswith(f"0/{kind}") for name in tensors) for kind in kinds), sorted(tensors)
    return path, tensors, metadata


def load_damaged(saved, data):
    path, learner = saved[0].with_name("damaged"), learner_on()
    learner.observe(random_ids(9, seed=5))
    before = everything(learner)
    write_checked(path, *data.draw(damaged_content(dict(saved[1]), dict(saved[2]))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a write that was dropped
        try:
            learner.memory.load(path)
        except ValueError as error:
            check_refusal(error, path)
            assert_equal_contents(everything(learner), before)
        else:
            learner.observe(random_ids(len(learner.memory.rows), 20, seed=7))


@FAST
@given(data=st.data())
def test_damaged_content_with_the_right_checksum(saved, data):
    load_damaged(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage_to_content(saved, data):
    load_damaged(saved, data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("0/read", lambda t: torch.cat([t, t, t]), "expected int64 .n., n at most"),
        ("0/read_mask", lambda t: t[1:], "read_mask is torch.bool of shape"),
        ("1/distilled/model.layers.0.mlp.up_proj.weight:up", lambda t: t.T, "expected bfloat16 or float32"),
        ("answers/ids", lambda t: t.long(), "expected int32 of shape"),
    ],
)
def test_what_does_not_fit_is_named(saved, name, change, message):
    path = saved[0].with_name("damaged")
    write_checked(path, {**saved[1], f"0/{name}": change(saved[1][f"0/{name}"])}, saved[2])
    with pytest.raises(ValueError, match=message):
        learner_on().memory.load(path)
