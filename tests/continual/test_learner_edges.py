"""A base that changes, calls that fail half-way, odd input, several files, names that nothing is kept by."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from nested_learning.continual import Learner, Level, Replay, stack_levels
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import random_ids, tiny_model

MODEL = tiny_model()
IDS = random_ids(40)


def learner_on(*levels, model=MODEL, **options):
    return stack_levels(model, levels=levels or [Level(4, 0.1)], **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestChangedBase:
    """W = W_base + Σ Δ, whatever W_base is now."""

    @staticmethod
    def expected(model, learner, ids):
        plain = copy.deepcopy(model)
        with torch.no_grad():
            for name, delta in learner.memory.diff().items():
                plain.get_parameter(name).add_(delta)
        return plain(input_ids=ids).logits

    @pytest.mark.parametrize("level", [Level(4, 0.1), Level(4, 0.1, sparse=0.3), Level(4, 0.1, rank=2)])
    @pytest.mark.parametrize("how", ["in place", "load_state_dict"])
    def test_is_seen_at_once(self, level, how):
        model = tiny_model()
        learner, ids = learner_on(level, model=model), IDS[None, :6]
        learner.observe(IDS[:12])
        learner.logits(ids)
        if how == "in place":
            with torch.no_grad():
                for name in learner.memory.diff():
                    model.get_parameter(name).mul_(3)
        else:
            other = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.5)
            model.load_state_dict(other.state_dict())
        torch.testing.assert_close(learner.logits(ids), self.expected(model, learner, ids))
        learner.observe(IDS[12:20])  # a sparse write touches few rows of the sum
        torch.testing.assert_close(learner.logits(ids), self.expected(model, learner, ids))

    def test_another_parameter_is_refused_and_stays(self):
        model = tiny_model()
        learner = learner_on(model=model)
        learner.observe(IDS[:12])
        new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(new, assign=True)
        with pytest.raises(ValueError, match="another parameter than when the learner was made"):
            learner.logits(IDS[None, :6])
        assert all(dict(model.named_parameters())[name] is not None for name in learner.memory.diff())


class TestFailedCalls:
    """Nothing changes before everything is checked, and a boundary is passed whole or not at all."""

    @pytest.mark.parametrize("call", ["observe", "score", "perplexity", "generate"])
    def test_a_matrix_without_rows(self, call):
        learner = learner_on()
        with pytest.raises(ValueError, match=r"ids must be \[T\] or \[B, T\]"):
            getattr(learner, call)(torch.zeros(0, 5, dtype=torch.long))
        assert len(learner.memory.rows) == 1

    def test_rows_for_one_row(self):
        learner = learner_on()
        with pytest.raises(ValueError, match="takes one sequence"):
            learner.observe([[1, 2], [3, 4]], row=0)
        assert len(learner.memory.rows) == 1
        learner.observe([1, 2])

    @pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
    def test_numbers_of_rows(self, count):
        learner = learner_on()
        with pytest.raises(ValueError, match="rows must be"):
            learner.memory.set_rows(count)
        assert len(learner.memory.rows) == 1

    def test_after_a_reset_the_first_text_fixes_the_rows(self):
        learner = learner_on()
        learner.observe([[1, 2], [3, 4]])
        learner.memory.reset()
        learner.observe([1, 2, 3])
        assert len(learner.memory.rows) == 1

    @pytest.mark.parametrize("failing", range(1, 15))
    def test_an_interrupt_anywhere(self, failing):
        """Also within a re-reading: going on from the position gives what an undisturbed reader has."""
        levels = Level(4, 0.1), Level(8, 0.1, reread=2)
        reference, learner = learner_on(*levels), learner_on(*levels)
        reference.observe(IDS[:16])
        passes = 0

        def interrupt(module, given):
            nonlocal passes
            passes += 1
            if passes == failing:
                raise KeyboardInterrupt

        handle = MODEL.register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                learner.observe(IDS[:16])
        finally:
            handle.remove()
        learner.observe(IDS[learner.memory.rows[0].position : 16])
        assert same(learner.memory.diff(), reference.memory.diff())

    def test_a_snapshot_of_another_learner(self):
        learner, other = learner_on(), learner_on(Level(4, 0.1, rank=2), Level(8, 0.1))
        learner.observe(IDS[:9])
        before = learner.memory.diff()
        for foreign, message in ((other.memory.snapshot(), "other levels"), (None, "got NoneType")):
            with pytest.raises(ValueError, match=message):
                learner.memory.restore(foreign)
        assert same(learner.memory.diff(), before)
        twin = learner_on()
        twin.memory.restore(learner.memory.snapshot())
        assert same(twin.memory.diff(), before)


def test_a_classifier_has_features_under_what_answers():
    """An average stands in the place of what it averages."""
    learner = learner_on(Level(4, 0.3), Level(8, average_of=0, rate=0.3))
    learner.observe(IDS)
    query = random_ids(7)
    classifier = learner.classifier("means", depth=1.0, row=0)
    with learner.active() as model, torch.no_grad():
        states = model(input_ids=query[None], output_hidden_states=True).hidden_states[-1][0]
    found = classifier._features.of([query])[0]
    torch.testing.assert_close(found, states.mean(0).double())


def test_a_classifier_leaves_nothing_on_the_model():
    model = tiny_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    learner = learner_on(model=model)
    learner.classifier().learn([IDS[:4], IDS[4:8]], ["a", "b"])
    twin = pickle.loads(pickle.dumps(learner))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(twin.logits(IDS[None, :4]), learner.logits(IDS[None, :4]))
    assert len(model(input_ids=IDS[None, :4], output_hidden_states=True).hidden_states) > 1


def test_locks_of_several_files(tmp_path):
    learner = learner_on()
    first, second = tmp_path / "a.st", tmp_path / "b.st"
    with learner.memory.lock(first):
        with learner.memory.lock(second), learner.memory.lock(first):
            learner.memory.save(first)
            learner.memory.save(second)
        learner.memory.save(first)
        with pytest.raises(ValueError, match="in use"):
            learner_on().memory.save(first)
    learner_on().memory.save(first)


def test_surprise_has_one_dtype():
    learner = learner_on()
    assert learner.score([3]).dtype == torch.float64
    assert [found.dtype for found in learner.observe([[1], [2, 3]])] == [torch.float64] * 2


class TestSettings:
    def test_nothing_to_take_over(self):
        with pytest.raises(ValueError, match="no weight in common"):
            learner_on(Level(4, 0.1, layers=[0]), Level(8, 0.0, consolidate=0.5, layers=[1]))

    @pytest.mark.parametrize("call", [{"level": 7}, {"level": -1}, {"level": 0.5}, {"row": 3}, {"row": "a"}])
    def test_levels_and_rows_of_diff(self, call):
        with pytest.raises(ValueError, match="must be from 0"):
            learner_on().memory.diff(**call)

    @pytest.mark.parametrize("name", ["segment", "window", "overlap"])
    @pytest.mark.parametrize("size", [2.5, True, "4", 0])
    def test_sizes_are_whole_numbers(self, name, size):
        with pytest.raises(ValueError, match=name):
            learner_on(**{name: size})

    @pytest.mark.parametrize(
        "option", [{"gradient_checkpointing": "x"}, {"seed": "a"}, {"starts": 3}, {"compile": "x"}]
    )
    def test_other_options(self, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
            learner_on(**option)

    @pytest.mark.parametrize("levels", [Level(8, 0.1), None, 3])
    def test_levels_are_a_list(self, levels):
        with pytest.raises(ValueError, match="levels must be a list"):
            stack_levels(MODEL, levels=levels)

    @pytest.mark.parametrize("options", [{"layers": 3}, {"layers": None}, {"learn_down": "no", "rank": 2}])
    def test_settings_of_a_level(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            Level(8, 0.1, **options)

    @pytest.mark.parametrize("levels", [0.5, "0", ["a"], [0.0], [True], [1]])
    def test_levels_that_answer(self, levels):
        with pytest.raises(ValueError, match="levels must be a list of indices"):
            learner_on().score([1, 2], levels=levels)


class TestInput:
    @pytest.mark.parametrize(
        "given",
        [[None], [[1, 2], None], [{}], [[1, "a"]], [[1, [2]]], b"abc", 3, [1.5], [True, "x"]],
        ids=str,
    )
    def test_what_is_no_ids(self, given):
        learner = learner_on()
        with pytest.raises(ValueError, match="ids"):
            learner.observe(given)
        assert learner.memory.is_empty

    @pytest.mark.parametrize("given", [torch.empty(3, dtype=torch.long, device="meta"), IDS[:3].to_sparse()])
    def test_tensors_without_values(self, given):
        with pytest.raises(ValueError, match="dense tensor"):
            learner_on().observe(given)

    @pytest.mark.parametrize(
        "given",
        [np.array([1, 2, 3]), list(np.array([1, 2, 3])), torch.tensor([1, 2, 3], dtype=torch.uint16),
         [np.array([1, 2, 3])]],
    )  # fmt: skip
    def test_ids_of_other_kinds(self, given):
        found = learner_on().score(given)
        expected = learner_on().score([1, 2, 3])
        torch.testing.assert_close(found[0] if isinstance(found, list) else found, expected, equal_nan=True)

    @pytest.mark.parametrize("ids", [torch.tensor([[10_000]]), IDS[:3], [[1, 2], [3]], "text", IDS[None, :0]])
    def test_logits(self, ids):
        with pytest.raises(ValueError, match=r"ids|text|tokens"):
            learner_on().logits(ids)

    def test_under_inference_mode(self):
        learner, twin = learner_on(), learner_on()
        with torch.inference_mode():
            losses = learner.observe(IDS.clone())
        torch.testing.assert_close(losses, twin.observe(IDS), equal_nan=True)
        learner.observe(IDS)
        twin.observe(IDS)
        assert same(learner.memory.diff(), twin.memory.diff())

    def test_a_perplexity_beyond_numbers(self):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(1e9)
        assert learner_on(model=model).perplexity(IDS) == math.inf


class TestNames:
    def test_after_the_stores_were_dropped(self):
        learner = learner_on(replay=Replay(tokens=64))
        learner.observe(IDS[:8], source="a")
        learner.memory.drop_stores()
        learner.observe(IDS[8:16], source="b")  # who passes names goes on without keeping them
        assert learner.sources() == []
        with pytest.raises(ValueError, match="unknown source 'a'"):
            learner.forget("a")

    @pytest.mark.parametrize("source", [["a"], 3])
    def test_what_is_no_name(self, source):
        with pytest.raises(ValueError, match="name of a source"):
            learner_on(replay=Replay(tokens=64)).forget(source)


class TestGenerate:
    def test_several_continuations(self):
        learner = learner_on()
        torch.manual_seed(0)
        found = learner.generate(IDS[:5], do_sample=True, num_return_sequences=3, max_new_tokens=4)
        assert found.shape == (3, 9)
        with pytest.raises(ValueError, match="takes one sequence, got 3"):
            learner.generate(IDS[:5], learn=True, do_sample=True, num_return_sequences=3, max_new_tokens=4)

    def test_lengths_and_mask_do_not_count_what_was_retrieved(self):
        pytest.importorskip("bm25s")
        learner = learner_on(replay=Replay(tokens=64))
        learner.observe(IDS, source="a")
        prompt = IDS[None, :4]
        plain = learner.generate(prompt, retrieve=8, max_new_tokens=3, do_sample=False)
        mask = torch.ones_like(prompt)
        found = learner.generate(prompt, retrieve=8, attention_mask=mask, max_length=7, do_sample=False)
        assert torch.equal(found, plain)


def test_auto_is_on_the_learner():
    assert Learner.auto(MODEL).levels[0].rank == 8


def test_half_a_character_is_refused():
    learner = stack_levels(MODEL, byte_tokenizer(), levels=[Level(4, 0.1)])
    for call in (learner.observe, learner.score, learner.generate):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            call("cut \ud83d")
