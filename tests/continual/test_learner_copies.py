"""Copies of learners, and several learners in threads: each goes on as it would alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nested_learning.continual import Level, deltas, stack_levels
from nested_learning.continual.writing import _norm
from tests.continual.tiny_models import random_ids, tiny_model

TEXTS = [random_ids(33, seed=seed) for seed in range(6)]
WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def learner_on(model, rule="gd", rank=None):
    return stack_levels(model, levels=[Level(4, 0.01, rule=rule, rank=rank), Level(8, 0.01, rule="adam")])


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    for name, p in model.named_parameters():
        assert isinstance(p, torch.nn.Parameter)
        assert torch.equal(p, before[name])


@ways
@pytest.mark.parametrize(("rule", "rank"), [("gd", None), ("m3", None), ("momentum", 2)])
def test_a_copy_goes_on_bit_by_bit(way, rule, rank):
    learner = learner_on(tiny_model(), rule, rank)
    learner.observe(TEXTS[0][:21])
    twin = way(learner)
    assert twin.model is not learner.model
    assert twin.reader.model is twin.model
    assert twin.reader.workspace is not learner.reader.workspace
    found = twin.observe(TEXTS[0][21:])
    assert torch.equal(found, learner.observe(TEXTS[0][21:]))
    assert torch.equal(twin.logits(TEXTS[1][None]), learner.logits(TEXTS[1][None]))
    learner.observe(TEXTS[2])  # moves the original alone
    assert not torch.equal(twin.logits(TEXTS[1][None]), learner.logits(TEXTS[1][None]))


def test_rows_that_were_pickled_keep_apart_in_a_process_that_counts_anew(monkeypatch):
    """A row's version says whose effective weights are made; two rows with the same one would share them."""
    monkeypatch.setattr(deltas, "_versions", itertools.count(1))  # few, whatever ran before
    learner = learner_on(tiny_model())
    learner.memory.set_rows(2)
    for row in (0, 1):
        learner.observe(TEXTS[row], row=row)
    pickled, ids = pickle.dumps(learner), TEXTS[2][None]
    highest = max(row.version for row in learner.memory.rows)
    monkeypatch.setattr(deltas, "_versions", itertools.count(1))
    twin = pickle.loads(pickled)
    expected = twin.logits(ids, row=0)
    for _ in range(highest + 2):
        twin.observe(TEXTS[3][:4], row=1)
        twin.logits(ids, row=1)
        assert torch.equal(twin.logits(ids, row=0), expected)


def test_a_copy_in_a_scope_has_the_base_model_itself():
    model = tiny_model()
    before = bits(model)
    learner = learner_on(model)
    learner.observe(TEXTS[0])
    with learner.active():
        twin = copy.deepcopy(learner)
        with pytest.raises(ValueError, match="leave `active`"):
            pickle.dumps(learner)
        inside = model(TEXTS[1][None]).logits
    assert_unchanged(twin.model, before)
    assert torch.equal(twin.logits(TEXTS[1][None]), inside)


def test_a_learner_made_in_the_scope_of_another_has_the_base_model_under_it(tmp_path):
    """It would take the other's effective weights for the base, and put them there for good."""
    model = tiny_model()
    before = bits(model)
    first = learner_on(model)
    first.observe(TEXTS[0])
    alone = learner_on(model).observe(TEXTS[1])
    with first.active():
        second = learner_on(model)
        found = second.observe(TEXTS[1])
        first.memory.save(tmp_path / "memory.safetensors")
    assert torch.equal(found.nan_to_num(), alone.nan_to_num())
    assert_unchanged(model, before)
    learner_on(model).memory.load(tmp_path / "memory.safetensors")


@pytest.mark.parametrize("rule", ["gd", "m3"])
def test_learners_in_threads_equal_one_after_the_other(rule):
    model = tiny_model()
    before = bits(model)

    def work(index):
        learner = learner_on(model, rule)
        losses = learner.observe(TEXTS[index])
        with learner.active() as active:
            logits = active(TEXTS[0][None]).logits
        return losses.nan_to_num(), logits.detach(), learner.perplexity(TEXTS[1])

    one_by_one = [work(index) for index in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(6)))
    for a, b in zip(one_by_one, together, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert a[2] == b[2]
    assert_unchanged(model, before)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e18, 1e25])
def test_the_norm_of_gradients_of_every_size(scale):
    grads = {"a": torch.full((3, 4), scale), "b": torch.full((5,), 2 * scale)}
    assert _norm(grads) == pytest.approx(scale * (12 + 20) ** 0.5, rel=1e-6)
    assert _norm({"a": torch.tensor([scale, float("nan")])}) != _norm(grads)


def test_a_norm_that_is_not_finite_stays_so():
    assert not torch.tensor(_norm({"a": torch.tensor([1.0, float("inf")])})).isfinite()
    assert not torch.tensor(_norm({"a": torch.tensor([1.0, float("nan")])})).isfinite()
