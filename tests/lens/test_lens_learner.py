"""Recordings of learners: what changed, which predictions moved, and that the learner stays as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nested_learning.continual import Level, stack_levels
from nested_learning.lens import lens, record_learner
from nested_learning.lens.of_learner import _windows
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import random_ids, tiny_model

LEVELS = [Level(4, 0.3), Level(8, 0.1, layers=[1])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_those_of_the_memory_diff(family):
    model, ids = tiny_model(family), random_ids(30)
    learner = stack_levels(model, levels=LEVELS)
    learner.observe(random_ids(9, seed=3))  # what was learned before counts as well
    before = learner.memory.snapshot()
    recording = record_learner(learner, ids)
    learned = recording.learned
    assert learner.memory.rows[0].position == learned.start == 9

    losses = learner.observe(ids)
    assert torch.equal(torch.from_numpy(recording.loss), losses)
    assert list(learned.writes) == learner.writes
    diff = learner.memory.diff()
    assert learned.norms.keys() == diff.keys() == learned.units.keys() == learned.layers.keys()
    for name, D in diff.items():
        assert learned.norms[name] == pytest.approx(float(D.norm()))
        weight = model.get_parameter(name).detach()
        assert learned.relative[name] == pytest.approx(float(D.norm() / weight.norm()))
        across = 1 - D.shape.index(16)  # the side that is not the model's width
        expected = D.square().sum(1 - across).sqrt()
        np.testing.assert_allclose(learned.units[name], expected.numpy())
        assert len(learned.units[name]) == D.shape[across] != 16
        assert f".{learned.layers[name]}." in name
    learner.memory.restore(before)


def test_predictions_are_compared_with_the_base_model():
    model, ids = tiny_model(), random_ids(30)
    learner = stack_levels(model, levels=LEVELS)
    learned = record_learner(learner, ids).learned
    with torch.no_grad():
        base = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        learner.observe(ids)
        now = learner.logits(ids[None])[0, :-1].log_softmax(-1)
    told = ids[1:]
    for found, p in ((learned.before, base), (learned.after, now)):
        assert np.isnan(found[0])
        np.testing.assert_allclose(found[1:], F.nll_loss(p, told, reduction="none").numpy(), rtol=1e-9)
    moved = (now.exp() * (now - base)).sum(-1)
    np.testing.assert_allclose(learned.divergence[1:], moved.numpy(), rtol=1e-7, atol=1e-12)
    first = learned.predictions[0]
    assert first.position == int(moved.argmax()) + 1
    assert first.divergence == pytest.approx(float(moved.max()))
    assert [int(word) for word, _ in first.after] == now[first.position - 1].topk(5).indices.tolist()
    assert first.before[0][1] == pytest.approx(float(base[first.position - 1].max().exp()))
    assert [p.divergence for p in learned.predictions] == sorted(moved.tolist(), reverse=True)


def test_nothing_is_moved_at_rate_zero():
    learner = stack_levels(tiny_model(), levels=[Level(4, 0.0)])
    learned = record_learner(learner, random_ids(20)).learned
    assert not learned.norms
    assert not np.nan_to_num(learned.divergence).any()
    assert np.array_equal(learned.before, learned.after, equal_nan=True)


def test_windows_predict_each_token_once():
    for count, window, overlap in ((2, 8, 2), (9, 8, 2), (10, 8, 2), (100, 8, 4), (50, 3, 1)):
        told = []
        for start, first, stop in _windows(count, window, overlap):
            assert start < first < stop
            assert stop - 1 - start <= window
            told += range(first, stop)
        assert told == list(range(1, count))


def test_a_text_longer_than_the_window_and_bad_input():
    learner = stack_levels(tiny_model(), levels=LEVELS)
    recording = lens(learner, random_ids(150), max_tokens=140)  # the model has 64 positions
    assert len(recording.tokens) == 140
    assert np.isfinite(recording.learned.after[1:]).all()
    for wrong in (random_ids(2, 5), random_ids(1)):
        with pytest.raises(ValueError, match=r"expected one text, or ids \[T\]"):
            record_learner(learner, wrong)
    with pytest.raises(ValueError, match="no tokenizer"):
        lens(learner, "text")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        lens(stack_levels(tiny_model(), byte_tokenizer(), levels=LEVELS), "cut \ud83d")


def test_an_average_is_told_and_a_weight_without_a_norm_has_no_share():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    learner = stack_levels(model, levels=[Level(4, 0.3), Level(8, average_of=0, rate=0.5)])
    learned = record_learner(learner, random_ids(20)).learned
    assert learned.levels[1] == "every 8 tokens, average of level 1, rate 0.5"
    shares = {name.split(".", 2)[2]: share for name, share in learned.relative.items()}
    assert math.isnan(shares["0.mlp.up_proj.weight"])
    assert shares["1.mlp.up_proj.weight"] > 0
