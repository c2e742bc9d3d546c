"""What belongs to another learner or another model: snapshots, files, Fisher diagonals, adapters, lengths."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch

from nested_learning.continual import Fisher, Learner, Level, Replay, learn_starts, stack_levels
from tests.continual.tiny_models import random_ids, tiny_model

IDS = random_ids(48)
LEVELS = [Level(4, 0.3)]


class TestSnapshots:
    def test_of_another_way_of_reading(self):
        model = tiny_model()
        wide, narrow = (stack_levels(model, levels=LEVELS, window=w, overlap=2) for w in (64, 8))
        wide.observe(IDS)
        with pytest.raises(ValueError, match="another way of reading"):
            narrow.memory.restore(wide.memory.snapshot())
        assert narrow.memory.is_empty

    def test_of_another_model(self):
        learner, other = (stack_levels(tiny_model(seed=seed), levels=LEVELS) for seed in (0, 1))
        learner.observe(IDS)
        with pytest.raises(ValueError, match="on another base model"):
            other.memory.restore(learner.memory.snapshot())
        twin = stack_levels(tiny_model(), levels=LEVELS)  # of another object with the same weights
        twin.memory.restore(learner.memory.snapshot())
        assert torch.equal(twin.logits(IDS[None]), learner.logits(IDS[None]))

    @pytest.mark.parametrize("anchor", ["background", "fisher", "starts"])
    def test_with_other_anchors(self, anchor):
        model = tiny_model()
        kl = 0.5 if anchor == "background" else 0.0
        stack = partial(stack_levels, model, levels=[Level(4, 0.3, decay=0.1, anchor_kl=kl)])
        one = stack(background=IDS) if kl else stack()
        others = {
            "background": lambda: {"background": IDS[1:]},
            "fisher": lambda: {"fisher": Fisher.of(model, IDS, length=8)},
            "starts": lambda: {"starts": learn_starts(one, [IDS], steps=1)},
        }
        other = stack(**others[anchor]())
        one.observe(IDS)
        with pytest.raises(ValueError, match=f"other anchors: its {anchor} is"):
            other.memory.restore(one.memory.snapshot())
        assert other.memory.is_empty

    def test_layers_counted_from_the_end(self, tmp_path):
        model = tiny_model()
        first, last = (stack_levels(model, levels=[Level(4, 0.3, layers=[i])]) for i in (0, -1))
        by_number = stack_levels(model, levels=[Level(4, 0.3, layers=[1])])
        last.observe(IDS)
        by_number.memory.restore(last.memory.snapshot())
        last.memory.save(path := tmp_path / "memory.safetensors")
        with pytest.raises(ValueError, match="other levels"):
            first.memory.load(path)
        by_number.memory.reset()
        by_number.memory.load(path)
        assert torch.equal(by_number.logits(IDS[None]), last.logits(IDS[None]))
        starts = learn_starts(last, [IDS], steps=1)
        stack_levels(model, levels=by_number.levels, starts=starts)
        with pytest.raises(ValueError, match="starts of level 0 were learned for"):
            stack_levels(model, levels=first.levels, starts=starts)

    def test_with_a_store_and_without(self):
        model, replay = tiny_model(), Replay(share=0.5, piece=4)
        plain, keeper = (stack_levels(model, levels=LEVELS, replay=each) for each in (None, replay))
        plain.observe(IDS)
        keeper.observe(IDS, source="a")
        with pytest.raises(ValueError, match="keeps what was read for replay"):
            plain.memory.restore(keeper.memory.snapshot())
        keeper.memory.restore(plain.memory.snapshot())
        keeper.observe(IDS, source="b")
        assert [source.name for source in keeper.sources()] == [None, "b"]
        assert any(write.replayed for write in keeper.writes)

    def test_of_dropped_stores_stays_without(self):
        learner = stack_levels(tiny_model(), levels=LEVELS, replay=Replay(piece=4))
        learner.observe(IDS, source="a")
        learner.memory.drop_stores()
        with learner.adaptation_scope():
            learner.observe(IDS)
        assert learner.sources() == []

    def test_a_pickled_one_has_no_base_model(self):
        learner = stack_levels(tiny_model(), levels=LEVELS)
        learner.observe(IDS)
        snapshot = pickle.loads(pickle.dumps(learner.memory.snapshot()))
        assert snapshot.model is None
        expected = learner.logits(IDS[None])
        learner.memory.reset()
        learner.memory.restore(snapshot)
        assert torch.equal(learner.logits(IDS[None]), expected)


class TestSettings:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (Level(4, 1, clip=1, decay=0), Level(4, 1.0)),
            (Level(4, 0.3, layers=np.arange(2)), Level(4, 0.3, layers=[0, 1])),
        ],
    )
    def test_equal_numbers_are_the_same_settings(self, one, other, tmp_path):
        model = tiny_model()
        learner, twin = (stack_levels(model, levels=[level]) for level in (one, other))
        learner.observe(IDS)
        learner.memory.save(tmp_path / "memory")
        twin.memory.load(tmp_path / "memory")
        assert torch.equal(twin.logits(IDS[None]), learner.logits(IDS[None]))

    @pytest.mark.parametrize("levels", [3, [1], []])
    def test_auto_without_levels(self, levels):
        with pytest.raises(ValueError, match="levels must be a list"):
            Learner.auto(tiny_model(), levels=levels)

    def test_sizes_of_the_window(self):
        with pytest.raises(ValueError, match=r"window must be a finite whole number >= 0, got True"):
            stack_levels(tiny_model(), levels=LEVELS, window=True)

    @pytest.mark.parametrize(("ids", "message"), [([[]], "without tokens"), ([True, False], "whole numbers")])
    def test_what_is_no_ids(self, ids, message):
        with pytest.raises(ValueError, match=message):
            stack_levels(tiny_model(), levels=LEVELS).observe(ids)


class TestLengths:
    def test_beyond_learned_positions(self, tmp_path):
        learner, long = stack_levels(tiny_model("gpt2"), levels=LEVELS), random_ids(1, 65)
        with pytest.raises(ValueError, match="a row has 65 tokens, and GPT2LMHeadModel has 64 positions"):
            learner.logits(long)
        with pytest.raises(ValueError, match="the probe has 65 tokens"):
            learner.export(tmp_path / "out", probe=long[0])
        assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="a prompt with its continuation has 72 tokens, and GPT2LMHead"):
            learner.generate(long[0, :60], max_new_tokens=12, eos_token_id=None)
        assert len(learner.generate(long[0, :60], max_length=64, eos_token_id=None)) == 64

    def test_beyond_computed_ones(self):
        long = random_ids(1, 65)
        assert stack_levels(tiny_model(), levels=LEVELS).logits(long).shape[:2] == long.shape


class TestWrappedModels:
    def test_fisher_of_a_compiled_model(self):
        compiled = torch.compile(tiny_model())
        fisher = Fisher.of(compiled, IDS, length=8)
        assert fisher.digest == Fisher.of(tiny_model(), IDS, length=8).digest
        stack_levels(compiled, levels=[Level(4, 0.3, decay=0.1)], fisher=fisher)

    def test_an_adapter_of_peft(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["up_proj"])).eval()
        fisher = Fisher.of(model, IDS, length=8)
        learner = stack_levels(model, levels=[Level(4, 0.3, decay=0.1)], fisher=fisher)
        learner.observe(IDS)
        for rank in (None, 2):
            with pytest.raises(ValueError, match="merge_and_unload"):
                learner.export(tmp_path / "out", lora_rank=rank)
        assert not (tmp_path / "out").exists()
