"""Learners in other surroundings: inference mode, autocast, default devices, a model that is moved."""

from __future__ import annotations

import copy

import pytest
import torch

from nested_learning.continual import Fisher, Level, Replay, learn_starts, stack_levels
from tests.continual.tiny_models import random_ids, tiny_model

IDS, BACKGROUND = random_ids(40), random_ids(20, seed=7)
LEVELS = {
    "full": [Level(4, 0.1), Level(8, 0.01, rule="adam")],
    "rank": [Level(4, 0.1, rank=2), Level(8, average_of=0, rate=0.5)],
    "fixed down": [Level(4, 0.1, rank=2, learn_down=False), Level(8, average_of=0, rate=0.5)],
    "taking over": [Level(4, 0.1, rank=2), Level(8, 0.01, consolidate=0.5)],
    "taking over at a rank": [Level(4, 0.1, rank=2), Level(8, 0.0, consolidate=0.5, rank=3)],
    "sparse": [Level(4, 1e-3, rule="adam", sparse=0.2)],
    "m3": [Level(4, 0.01, rule="m3")],
    "more": [Level(4, 0.1, reread=1, distill=0.5, gate_quantile=0.5), Level(8, 0.01, rank=2, anchor_kl=0.1)],
}
each_way = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)


def learner_of(levels, model=None, **options):
    pulled = any(level.anchor_kl for level in levels)
    options = {"window": 32, **({"background": BACKGROUND} if pulled else {}), **options}
    return stack_levels(tiny_model() if model is None else model, levels=levels, **options)


def tensors_of(memory, path):
    memory.save(path)
    return [t for row in memory.rows for state in row.levels for t in state.tensors()]


def assert_alike(learner, twin):
    found, expected = learner.memory.diff(), twin.memory.diff()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=0)


class TestInferenceMode:
    """What is asked inside of it leaves nothing that cannot be learned from outside."""

    @each_way
    def test_learning_goes_on_after_questions(self, levels):
        learner, twin = learner_of(levels), learner_of(levels)
        for start in (0, 20):
            with torch.inference_mode():
                learner.score(IDS[:9])
                learner.logits(IDS[None, :9])
                learner.generate(IDS[:5], max_new_tokens=2, do_sample=False)
                with learner.active() as model:
                    model(IDS[None, :5])
            learner.observe(IDS[start : start + 20])
            twin.observe(IDS[start : start + 20])
        assert_alike(learner, twin)

    @each_way
    def test_what_is_made_in_it_learns_outside(self, levels, tmp_path):
        model, twin = tiny_model(), learner_of(levels)
        with torch.inference_mode():
            learner = learner_of(levels, model)
            learner.observe(IDS[:22])
            learner.memory.save(tmp_path / "memory", dtype=torch.bfloat16)
            loaded = learner_of(levels, model)
            loaded.memory.load(tmp_path / "memory")
            copied = copy.deepcopy(learner)
        twin.observe(IDS[:22])
        for each in (learner, copied, twin, loaded):
            each.observe(IDS[22:])
        assert_alike(learner, twin)
        assert_alike(copied, twin)

    def test_forgetting(self):
        learner, twin = (learner_of(LEVELS["full"], replay=Replay(piece=4)) for _ in range(2))
        with torch.inference_mode():
            learner.observe(IDS[:11], source="a")
            learner.observe(IDS[11:30], source="b")
            assert not learner.forget("a").carried
        for ids in (IDS[11:30], IDS[30:]):
            twin.observe(ids, source="b")
        learner.observe(IDS[30:], source="b")
        assert_alike(learner, twin)

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_background_and_starts(self, mode):
        model, levels = tiny_model(), [Level(4, 0.1, decay=0.1)]
        with mode():
            fisher = Fisher.of(model, IDS, length=8)
            starts = learn_starts(learner_of(levels, model), IDS, steps=2)
        assert fisher.digest == Fisher.of(model, IDS, length=8).digest
        assert starts.digest == learn_starts(learner_of(levels, model), IDS, steps=2).digest
        learner_of(levels, model, fisher=fisher, starts=starts).observe(IDS)

    def test_labels(self):
        classifier = learner_of(LEVELS["full"]).classifier("means")
        with torch.inference_mode():
            classifier.learn([IDS[:5], IDS[5:9]], ["a", "b"])
        classifier.learn(IDS[9:12], "a")
        assert classifier.predict(IDS[5:9]) == "b"

    def test_a_model_that_was_made_in_it(self):
        with torch.inference_mode():
            model = tiny_model()
        with pytest.raises(ValueError, match="load the model outside of that mode"):
            learner_of(LEVELS["full"], model)
        assert learner_of([Level(4, 0.0)], model).score(IDS).shape == IDS.shape


class TestAutocast:
    @each_way
    def test_the_memory_is_float32(self, levels, tmp_path):
        model = tiny_model(dtype=torch.float32)
        learner, plain = learner_of(levels, model), learner_of(levels, model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            learner.observe(IDS)
            diff = learner.memory.diff()
            report = learner.export(tmp_path / "adapter", lora_rank=2)
        found = tensors_of(learner.memory, tmp_path / "memory")
        assert {t.dtype for t in [*found, *diff.values()]} <= {torch.float32, torch.int64}
        for name, delta in learner.memory.diff().items():
            torch.testing.assert_close(diff[name], delta, rtol=0, atol=0)
        assert report.truncated == learner.export(tmp_path / "again", lora_rank=2).truncated
        plain.memory.load(tmp_path / "memory")
        assert_alike(plain, learner)

    def test_starts_are_whole_numbers_of_float32(self):
        model = tiny_model(dtype=torch.float32)
        untaught = learner_of([Level(4, 0.1)], model)
        starts = learn_starts(untaught, IDS, steps=3, rank=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            begun = learner_of([Level(4, 0.1)], model, starts=starts)
        assert_alike(begun, learner_of([Level(4, 0.1)], model, starts=starts))

    def test_reading_goes_on_outside(self):
        learner = learner_of(LEVELS["full"], tiny_model(dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            learner.observe(IDS[:21])
        assert learner.observe(IDS[21:]).isfinite().all()


class TestDefaultDevice:
    @each_way
    def test_is_not_that_of_the_learner(self, levels, tmp_path):
        model, twin = tiny_model(), learner_of(levels, replay=Replay(piece=4))
        twin.observe(IDS)
        with torch.device("meta"):  # tensors without a device of their own would have no values
            learner = learner_of(levels, model, replay=Replay(piece=4))
            learner.observe(IDS[:21].tolist(), learn_mask=[True] * 21)
            learner.memory.save(tmp_path / "memory")
            learner.memory.load(tmp_path / "memory")
            learner.observe(IDS[21:])
            learner.score(IDS)
        assert_alike(learner, twin)

    def test_of_other_parts(self):
        model, levels = tiny_model(), [Level(4, 0.1)]
        with torch.device("meta"):
            starts = learn_starts(learner_of(levels, model), IDS, steps=1)
            found = []
            for kind, options in (("lda", {}), ("means", {}), ("kernel lda", {"width": 16, "first": 2})):
                classifier = learner_of(levels, model).classifier(kind, **options)
                classifier.learn([IDS[:9], IDS[9:12]], ["a", "b"])
                found.append(classifier.predict(IDS[:9]))
        assert found == ["a", "a", "a"]
        assert starts.digest == learn_starts(learner_of(levels, model), IDS, steps=1).digest


class TestMovedModels:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @each_way
    def test_to_another_precision(self, levels, dtype, tmp_path):
        model = tiny_model(dtype=torch.float32)
        learner = learner_of(levels, model)
        learner.observe(IDS[:22])
        model.to(dtype)
        assert learner.observe(IDS[22:]).isfinite().all()
        learner.memory.save(tmp_path / "memory")
        learner.memory.load(tmp_path / "memory")
        assert learner.observe(IDS[:9]).isfinite().all()

    def test_to_another_device(self):
        learner = learner_of(LEVELS["rank"])
        for writer in learner.reader.writers:  # as if the model had been on a GPU when it was made
            writer.devices = dict.fromkeys(writer.devices, torch.device("cuda:0"))
        for ask in (learner.score, learner.observe):
            with pytest.raises(ValueError, match="is on cpu and was on cuda:0 when the learner was made"):
                ask(IDS)


@each_way
def test_reading_changes_no_memory(levels, tmp_path):
    learner = learner_of(levels)
    for read in (0, 22):
        if read:
            learner.observe(IDS[:read])
        before = learner.memory.nbytes, sorted(learner.memory.diff())
        learner.logits(IDS[None, :5])
        learner.score(IDS)
        assert (learner.memory.nbytes, sorted(learner.memory.diff())) == before
