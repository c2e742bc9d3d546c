"""What must not matter: pieces, neighbours in a batch, other learners on the same model, scopes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_learning.continual import Level, stack_levels
from tests.continual.tiny_models import CONFIGS, random_ids, tiny_model

MODEL = tiny_model()
LEVELS = (
    Level(4, 0.3, rule="momentum", gate_quantile=0.2),
    Level(7, 0.2, layers=[1], consolidate=0.5, decay=0.1),
    Level(16, 0.1, rank=2, rule="adam"),
)


def learner_on(model=MODEL, levels=LEVELS, **options):
    return stack_levels(model, levels=levels, **{"window": 24, "overlap": 5, **options})


def contents(learner, row=0):
    """All tensors and numbers of a row."""
    row = learner.memory.rows[row]
    tensors = [row.tokens, row.learn, *(t for layer in row.context.layers for t in layer.values())]
    for state in row.levels:
        for kept in (state.deltas, state.sums, state.drawn, state.units, state.background):
            tensors += [t for _, t in sorted(kept.items())]
        tensors += [t for _, stored in sorted(state.rule.items()) for _, t in sorted(stored.items())]
        tensors.append(torch.tensor([state.loss, state.pairs, *state.history], dtype=torch.float64))
    return [torch.tensor([row.position, row.start]), *tensors]


def assert_equal_contents(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def assert_close_contents(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)


@settings(max_examples=12, deadline=None)
@given(pieces=st.lists(st.integers(1, 19), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_any_pieces_give_what_the_whole_gives(pieces, seed):
    ids = random_ids(sum(pieces), seed=seed)
    whole, streamed = learner_on(), learner_on()
    mask = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) < 0.8
    expected = whole.observe(ids, learn_mask=mask)
    parts = zip(ids.split(pieces), mask.split(pieces), strict=True)
    found = torch.cat([streamed.observe(piece, learn_mask=part) for piece, part in parts])
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert_close_contents(contents(streamed), contents(whole))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3), seed=st.integers(0, 100))
def test_a_row_is_a_learner_of_its_own(lengths, seed):
    texts = [random_ids(length, seed=seed + i) for i, length in enumerate(lengths)]
    batch = learner_on()
    surprises = batch.observe(texts)
    more = batch.observe(random_ids(len(texts), 9, seed=seed))
    for i, text in enumerate(texts):
        alone = learner_on()
        assert torch.equal(alone.observe(text)[1:], surprises[i][1:])
        assert torch.equal(alone.observe(random_ids(len(texts), 9, seed=seed)[i]), more[i])
        assert_equal_contents(contents(batch, i), contents(alone))


@pytest.mark.parametrize("family", CONFIGS)
def test_learning_rate_zero_is_the_base_model(family):
    model = tiny_model(family, dtype=torch.float32)
    learner = stack_levels(model, levels=[Level(4, 0.0), Level(8, 0.0, rank=2)])
    ids = random_ids(2, 20)
    before = model(ids).logits
    learner.observe(ids[0])
    assert torch.equal(learner.logits(ids), before)
    with learner.active():
        assert torch.equal(model(ids).logits, before)


def test_the_base_model_is_untouched():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    learner = learner_on(model)
    learner.observe(random_ids(50))
    learner.generate(random_ids(5), max_new_tokens=3, do_sample=False)
    after = dict(model.named_parameters())
    assert all(after[name] is parameters[name] for name in parameters)  # the very objects
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in after.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_learners_on_one_model_do_not_mix():
    """Interleaved, inside each other's scopes, and with different layers: as if each were alone."""
    model = tiny_model()
    ids, other_ids = random_ids(33), random_ids(33, seed=1)
    first, second = learner_on(model), learner_on(model, [Level(3, 0.5, layers=[0])])
    for a, b in zip(ids.split(11), other_ids.split(11), strict=True):
        first.observe(a)
        with first.active():
            second.observe(b)
            inside = model(ids[None]).logits
        assert torch.equal(inside, first.logits(ids[None]))
    alone, other_alone = learner_on(), learner_on(levels=[Level(3, 0.5, layers=[0])])
    for a, b in zip(ids.split(11), other_ids.split(11), strict=True):
        alone.observe(a)
        other_alone.observe(b)
    assert_equal_contents(contents(first), contents(alone))
    assert_equal_contents(contents(second), contents(other_alone))


def test_threads_on_one_model_do_not_mix():
    model = tiny_model()
    texts = [random_ids(40, seed=i) for i in range(4)]
    learners = [learner_on(model) for _ in texts]
    threads = [
        threading.Thread(target=lambda pair=pair: [pair[0].observe(piece) for piece in pair[1].split(5)])
        for pair in zip(learners, texts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for learner, text in zip(learners, texts, strict=True):
        alone = learner_on()
        for piece in text.split(5):
            alone.observe(piece)
        assert_equal_contents(contents(learner), contents(alone))


def learn_then_fail(learner):
    learner.observe(random_ids(50, seed=1))
    learner.observe([])


class TestAdaptationScope:
    def test_restores_every_bit(self):
        learner = learner_on()
        learner.observe(random_ids(21))
        before = [t.clone() for t in contents(learner)]
        logits = learner.logits(random_ids(1, 9))
        with learner.adaptation_scope() as same:
            assert same is learner
            learner.observe(random_ids(50, seed=1))
            assert not torch.equal(learner.logits(random_ids(1, 9)), logits)
        assert_equal_contents(contents(learner), before)
        assert torch.equal(learner.logits(random_ids(1, 9)), logits)

    def test_restores_after_an_exception_and_goes_on_as_before(self):
        learner, undisturbed = learner_on(), learner_on()
        for either in (learner, undisturbed):
            either.observe(random_ids(21))
        with pytest.raises(ValueError, match="expected a text"), learner.adaptation_scope():
            learn_then_fail(learner)
        for either in (learner, undisturbed):
            either.observe(random_ids(30, seed=2))
        assert_equal_contents(contents(learner), contents(undisturbed))

    def test_nested_scopes(self):
        learner = learner_on()
        learner.observe(random_ids(10))
        outer = [t.clone() for t in contents(learner)]
        with learner.adaptation_scope():
            learner.observe(random_ids(10, seed=1))
            inner = [t.clone() for t in contents(learner)]
            for seed in (2, 3):
                with learner.adaptation_scope():
                    learner.observe(random_ids(30, seed=seed))
                assert_equal_contents(contents(learner), inner)
            learner.memory.reset()
        assert_equal_contents(contents(learner), outer)

    def test_a_failure_while_reading_leaves_model_and_memory_as_they_were(self, monkeypatch):
        model = tiny_model()
        learner = learner_on(model)
        learner.observe(random_ids(20))
        before = [t.clone() for t in contents(learner)]
        weight = model.model.layers[0].mlp.up_proj.weight
        monkeypatch.setattr(type(model.lm_head), "forward", lambda *_: 1 / 0)
        for length in (1, 20):  # while scoring a piece of a segment, and while reading a whole one
            with pytest.raises(ZeroDivisionError):
                learner.observe(random_ids(length, seed=1))
            assert_equal_contents(contents(learner), before)
        assert model.model.layers[0].mlp.up_proj.weight is weight
        assert not any(module._forward_hooks for module in model.modules())


def test_scoring_learns_nothing_and_scores_as_observing_does():
    learner = learner_on(levels=[Level(50, 0.3)], window=64)
    ids = random_ids(30)
    before = contents(learner)
    scores = learner.score(ids)
    assert_equal_contents(contents(learner), before)
    torch.testing.assert_close(learner.observe(ids), scores, equal_nan=True)
    loss = MODEL(ids[None], labels=ids[None]).loss  # in float32, whatever the model is
    torch.testing.assert_close(scores[1:].mean().float(), loss)
    assert learner.perplexity(ids) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert learner.perplexity([ids, ids[:9]])[0] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_chunk_is_scored_before_it_is_learned():
    learner, base = (learner_on(levels=[Level(16, lr)], window=64) for lr in (0.9, 0.0))
    ids = random_ids(16)
    assert torch.equal(learner.observe(ids)[1:], base.observe(ids)[1:])
    assert learner.perplexity(ids) < base.perplexity(ids)
