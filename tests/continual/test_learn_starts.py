"""Learned rates and starts: that they help on other texts, what a learner with them does, and their files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning.continual import Level, Replay, Starts, learn_starts, reopen, stack_levels
from nested_learning.continual.adaptation import Adapter
from nested_learning.continual.starts.starts import LevelStart
from tests.continual.test_invariances import assert_close_contents, assert_equal_contents, contents
from tests.continual.test_options_together import LEVELS as TOGETHER
from tests.continual.tiny_models import random_ids, tiny_model
from tests.damage import check_refusal, damaged_bytes, damaged_content, read_file, write_checked

MODEL = tiny_model(dtype=torch.float32)
LEVELS = {
    "full": [Level(4, 0.3), Level(8, 0.1, rule="momentum")],
    "rank": [Level(4, 0.3, rank=2), Level(8, average_of=0, rate=0.5)],
    "up": [Level(4, 0.3, rank=2, learn_down=False), Level(8, average_of=0, rate=0.5)],
    "smaller average": [Level(4, 0.3, rank=3), Level(8, average_of=0, rate=0.5, rank=1)],
}


def texts(count, seed=0):
    """Texts [48] of one kind: a few words that repeat, other ones in each text."""
    found = []
    for i in range(count):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        words = torch.randint(0, 12, (3, 4), generator=draw)
        found.append(words[torch.randint(0, 3, (12,), generator=draw)].flatten())
    return found


def learner_with(levels="full", model=MODEL, **options):
    levels = LEVELS[levels] if isinstance(levels, str) else levels
    return stack_levels(model, levels=levels, **{"window": 24, "overlap": 4, **options})


def starts_for(levels="full", model=MODEL, **options):
    """Starts after two steps of large rates, far from none."""
    rates = {"steps": 2, "lr_rates": 0.3, "lr_starts": 0.05, "rank": 2}
    return learn_starts(learner_with(levels, model), texts(4), **{**rates, **options})


@pytest.fixture(scope="module", params=LEVELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def starts(kind):
    return starts_for(kind)


def mean_loss(learner, ids):
    with learner.adaptation_scope():
        return float(learner.observe(ids)[1:].mean())


class TestLearning:
    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize("what", ["both", "rates", "starts"])
    def test_other_texts_of_the_kind_cost_less(self, exact, what):
        rates = {
            "both": {},
            "rates": {"lr_starts": 0},
            "starts": {"lr_rates": 0},
        }[what]
        learner = learner_with([Level(4, 0.05), Level(12, 0.05)], window=48, overlap=4)
        found = learn_starts(
            learner, texts(6), steps=18, exact=exact, **{"lr_rates": 0.2, "lr_starts": 3e-3, **rates}
        )
        with_starts = learner_with([Level(4, 0.05), Level(12, 0.05)], window=48, overlap=4, starts=found)
        others = texts(6, seed=1)
        before = [mean_loss(learner, ids) for ids in others]
        after = [mean_loss(with_starts, ids) for ids in others]
        assert sum(after) < sum(before) - (0.01 if what == "rates" else 0.2) * len(others)
        assert bool(any(level.tensors for level in found.levels)) == (what != "rates")
        moved = any(abs(rate - 1) > 1e-6 for level in found.levels for rate in level.rates.values())
        assert moved == (what != "starts")

    def test_what_was_best_on_held_out_texts_is_returned(self):
        found = starts_for(steps=20, lr_starts=0.5, held_out=texts(2, seed=3))
        held_out = dict(found.report["held_out"])
        assert min(held_out, key=held_out.get) not in (20,)
        learner = learner_with(starts=found)
        losses = torch.cat([learner_with(starts=found).observe(ids)[1:] for ids in texts(2, seed=3)])
        assert float(losses.mean()) == pytest.approx(min(held_out.values()), rel=1e-5)
        assert learner.memory.starts is found
        assert len(found.report["losses"]) == 20

    def test_it_goes_on_from_a_learners_own_starts(self):
        """Two steps and two more, Adam begun anew, on one text; the loss is where the first ones ended."""
        one = texts(1)
        first = learn_starts(learner_with(), one, steps=2, lr_starts=0.01)
        second = learn_starts(learner_with(starts=first), one, steps=1, lr_starts=0.01)
        begun = float(learner_with(starts=first).observe(one[0])[1:].mean())
        assert second.report["losses"][0] == pytest.approx(begun, rel=1e-5)

    def test_the_learner_and_its_model_stay_as_they_are(self):
        model = tiny_model(dtype=torch.float32)
        before = {name: p.clone() for name, p in model.named_parameters()}
        learner = learner_with(model=model)
        learner.observe(random_ids(13))
        content = contents(learner)
        starts_for(model=model, exact=True)
        learn_starts(learner, texts(1), steps=1)
        assert_equal_contents(contents(learner), content)
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())

    @pytest.mark.parametrize("levels", TOGETHER)
    def test_first_order_has_every_option(self, levels):
        options = {"background": random_ids(40, seed=9), "overlap": 5}
        model = tiny_model()
        learner = learner_with(TOGETHER[levels], model, **options)
        found = learn_starts(learner, texts(2), steps=2, lr_starts=0.01)
        both = learner_with(TOGETHER[levels], model, starts=found, **options)
        assert float(both.observe(texts(1)[0])[1:].mean()) > 0
        for level, own in zip(found.levels, TOGETHER[levels], strict=True):
            assert bool(level.rates) == (own.lr > 0)

    def test_a_step_that_is_not_finite_is_left_out(self):
        model = tiny_model(dtype=torch.float32)
        with torch.no_grad():
            model.model.embed_tokens.weight[5] = float("nan")
        with pytest.warns(RuntimeWarning, match="was left out: its loss is nan"):
            found = learn_starts(learner_with(model=model), torch.full((20,), 5), steps=1)
        assert all(rate == 1.0 for level in found.levels for rate in level.rates.values())
        assert found.report["losses"] == [None]

    @pytest.mark.parametrize(
        ("levels", "options", "message"),
        [
            ([Level(4, 0.0)], {}, "no level learns"),
            ([Level(4, 0.1), Level(8, 0.0, consolidate=0.5)], {}, "level 1 has consolidate=0.5"),
            ([Level(4, 0.1)], {"steps": 0}, "steps must be"),
            ([Level(4, 0.1)], {"rank": 0}, "rank must be"),
            ([Level(4, 0.1)], {"batch_size": 0}, "batch_size must be"),
            ([Level(4, 0.1)], {"lr_rates": -1.0}, "lr_rates must be"),
            ([Level(4, 0.1)], {"lr_rates": 0, "lr_starts": 0}, "both 0"),
            ([Level(4, 0.1, sparse=0.5)], {"lr_rates": 0}, "sparse levels have no starts"),
            ([Level(48, 0.1)], {}, "texts has no text longer than the fastest chunk of 48"),
            ([Level(4, 0.1)], {"held_out": [[1, 2, 3]]}, "held_out has no text longer"),
            ([Level(4, 0.1, rule="m3")], {"exact": True}, "rule='m3'"),
            ([Level(4, 0.1, sparse=0.5)], {"exact": True}, "sparse=0.5 and chooses"),
            ([Level(4, 0.1, reread=1)], {"exact": True}, "reread=1"),
            ([Level(4, 0.1, distill=0.5)], {"exact": True}, "distill=0.5"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, levels, options, message):
        learner = learner_with(levels, window=48)
        with pytest.raises(ValueError, match=message):
            learn_starts(learner, texts(1), **{"steps": 1, **options})

    def test_exact_with_checkpointing_is_refused(self):
        with pytest.raises(ValueError, match="gradient_checkpointing would run"):
            learn_starts(learner_with(gradient_checkpointing=True), texts(1), steps=1, exact=True)


class TestLearner:
    def test_it_begins_at_the_starts_and_goes_back_to_them(self, kind, starts):
        learner, fresh = learner_with(kind, starts=starts), learner_with(kind, starts=starts)
        plain, probe = learner_with(kind), random_ids(20, seed=2)
        assert not torch.equal(learner.score(probe)[1:], plain.score(probe)[1:])
        assert torch.equal(learner.logits(probe[None], levels=[]), MODEL(probe[None]).logits)
        expected = fresh.score(probe)
        with learner.adaptation_scope():
            learner.observe(random_ids(30))
            assert not torch.equal(learner.score(probe)[1:], expected[1:])
        assert torch.equal(learner.score(probe)[1:], expected[1:])
        learner.observe(random_ids(30))
        for level in range(len(LEVELS[kind])):
            learner.memory.reset(level)
        assert torch.equal(learner.score(probe)[1:], expected[1:])
        learner.memory.reset()
        assert_equal_contents(contents(learner), contents(fresh))

    def test_an_average_begins_where_its_level_does(self, kind, starts):
        learner, probe = learner_with(kind, starts=starts), random_ids(20, seed=2)
        if kind == "full":
            assert learner.memory.diff(0).keys() == learner.memory.diff(1).keys()
            return
        answer, own = learner.score(probe), learner.score(probe, levels=[0])
        if kind == "smaller average":
            assert not torch.allclose(answer[1:], learner.score(probe, levels=[])[1:])
        else:
            torch.testing.assert_close(answer[1:], own[1:], rtol=1e-4, atol=1e-4)

    def test_pieces_rows_files_and_copies(self, kind, starts, tmp_path):
        ids = random_ids(41)
        whole, streamed = learner_with(kind, starts=starts), learner_with(kind, starts=starts)
        rows = learner_with(kind, starts=starts)
        expected = whole.observe(ids)
        found = [streamed.observe(piece) for piece in ids[:23].split([5, 1, 17])]
        streamed.memory.save(tmp_path / "memory")
        resumed = reopen(tmp_path / "memory", MODEL, starts=starts)
        for other in (resumed, copy.deepcopy(streamed), pickle.loads(pickle.dumps(streamed))):
            assert_equal_contents(contents(other), contents(streamed))
            rest = other.observe(ids[23:])
            torch.testing.assert_close(torch.cat([*found, rest]), expected, equal_nan=True)
            for a, b in zip(contents(other), contents(whole), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        rows.observe([random_ids(10, seed=1), ids])
        assert_equal_contents(contents(rows, 1), contents(whole))

    def test_what_is_forgotten_was_never_read(self, kind, starts):
        options = {"starts": starts, "replay": Replay(400, share=0.3, piece=6)}
        forgetful, innocent = learner_with(kind, **options), learner_with(kind, **options)
        for source in "ab":
            forgetful.observe(random_ids(30, seed=ord(source)), source=source)
        assert forgetful.forget("b").carried == ()
        innocent.observe(random_ids(30, seed=ord("a")), source="a")
        assert_equal_contents(contents(forgetful), contents(innocent))

    def test_an_export_has_the_starts_in_it(self, kind, starts, tmp_path):
        learner = learner_with(kind, starts=starts)
        assert learner.export(tmp_path / "begun", probe=random_ids(14)).difference < 1e-3
        learner.observe(random_ids(21))
        assert learner.export(tmp_path / "later", probe=random_ids(14)).difference < 1e-3

    def test_a_memory_says_which_starts_it_needs(self, starts, kind, tmp_path):
        learner, other = learner_with(kind, starts=starts), starts_for(kind, steps=1)
        learner.observe(random_ids(9))
        learner.memory.save(tmp_path / "memory")
        with pytest.raises(ValueError, match=f"the starts {starts.digest[:12]}…; this learner has no starts"):
            learner_with(kind).memory.load(tmp_path / "memory")
        with pytest.raises(ValueError, match=f"this learner has the starts {other.digest[:12]}….*starts="):
            learner_with(kind, starts=other).memory.load(tmp_path / "memory")
        with pytest.raises(ValueError, match="starts"):
            reopen(tmp_path / "memory", MODEL)
        learner_with(kind).memory.save(tmp_path / "plain")
        with pytest.raises(ValueError, match="no starts; this learner has the starts"):
            learner.memory.load(tmp_path / "plain")

    def test_the_rates_are_those_of_the_writes(self):
        """A rate of 3 on one matrix: its first write is three times as long, the others are as they were."""
        plain, name = learner_with([Level(4, 0.3)]), "model.layers.1.mlp.up_proj.weight"
        plain.observe(random_ids(4))
        rates = starts_for([Level(4, 0.3)], lr_starts=0)
        assert not rates.levels[0].tensors
        chosen = Starts(rates.fingerprint, rates.settings, rates.weights, (LevelStart({name: 3.0}),))
        learner = learner_with([Level(4, 0.3)], starts=chosen)
        learner.observe(random_ids(4))
        for slot, delta in plain.memory.diff().items():
            factor = 3.0 if slot == name else 1.0
            torch.testing.assert_close(learner.memory.diff()[slot], factor * delta)

    def test_training_the_base_begins_at_the_starts(self, kind, starts):
        learner, ids = learner_with(kind, starts=starts), random_ids(2, 20)
        losses = [learner_with(kind, starts=starts).observe(row)[1:].mean() for row in ids]
        torch.testing.assert_close(Adapter(learner).loss(ids), torch.stack(losses).mean())

    def test_they_work_with_all_options(self, tmp_path):
        replay, model = Replay(500, share=0.4, piece=6), tiny_model()
        options = {"background": random_ids(40, seed=9), "overlap": 5, "replay": replay}
        for levels in TOGETHER.values():
            found = learn_starts(learner_with(levels, model, **options), texts(1), steps=1, lr_starts=0.01)
            whole, streamed = (learner_with(levels, model, starts=found, **options) for _ in range(2))
            whole.observe(random_ids(50), source="a")
            for piece in random_ids(50).split([3, 17, 1, 29]):
                streamed.observe(piece, source="a")
                streamed.memory.save(tmp_path / "memory")
                streamed.memory.load(tmp_path / "memory")
            assert_close_contents(contents(streamed), contents(whole))


class TestFile:
    def test_it_is_what_was_saved(self, kind, starts, tmp_path):
        path = tmp_path / "starts.safetensors"
        starts.save(path)
        loaded = Starts.load(path)
        assert loaded.digest == starts.digest
        assert loaded.report == starts.report
        learner, other = learner_with(kind, starts=starts), learner_with(kind, starts=path)
        assert_equal_contents(contents(learner), contents(other))
        learner.observe(random_ids(9))
        learner.memory.save(tmp_path / "memory")
        other.memory.load(tmp_path / "memory")

    def test_bfloat16_is_half_of_it_and_another_one(self, starts, tmp_path):
        small = starts.rounded(torch.bfloat16)
        assert small.nbytes == starts.nbytes // 2
        assert small.digest != starts.digest
        small.save(tmp_path / "small")
        assert Starts.load(tmp_path / "small").digest == small.digest
        with pytest.raises(ValueError, match="starts are in"):
            starts.rounded(torch.int8)

    def test_others_are_refused(self, starts, kind, tmp_path):
        with pytest.raises(ValueError, match="belong to another base model"):
            learner_with(kind, model=tiny_model(dtype=torch.float32, seed=1), starts=starts)
        with pytest.raises(ValueError, match=r"levels with .*, this learner has"):
            learner_with([Level(4, 0.1)], starts=starts)
        with pytest.raises(ValueError, match="starts of level 0 were learned for 6 weights"):
            learner_with(kind, modules=["mlp.up_proj"], starts=starts)
        with pytest.raises(FileNotFoundError, match="no starts file"):
            learner_with(kind, starts=tmp_path / "none")
        learner_with(kind).memory.save(tmp_path / "memory")
        with pytest.raises(ValueError, match="has no learned starts of version 1"):
            Starts.load(tmp_path / "memory")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, m: t.update({"9/x": torch.ones(2)}), "belongs to none of its 2 levels"),
            (lambda t, m: t.update({next(iter(t)): torch.full((2,), torch.inf)}), "expected finite numbers"),
            (lambda t, m: m.update(rates='[{"a": -1.0}, {}]'), "the rate of a is -1.0"),
            (lambda t, m: m.update(levels="[1, 2]"), "its levels are not those of 2 levels"),
            (lambda t, m: m.pop("report"), "its 'report' is missing"),
        ],
    )
    def test_damage_is_told(self, tmp_path, change, message):
        path = tmp_path / "starts"
        starts_for("full").save(path)
        tensors, metadata = read_file(path)
        change(tensors, metadata)
        write_checked(path, tensors, metadata)
        with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
            Starts.load(path)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_a_damaged_one_is_refused_or_works(self, starts, kind, tmp_path, data):
        path = tmp_path / "starts"
        starts.save(path)
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        else:
            write_checked(path, *data.draw(damaged_content(*read_file(path))))
        try:
            learner = learner_with(kind, starts=path)
        except ValueError as error:
            if str(path) in str(error):
                check_refusal(error, path)
            return
        learner.observe(random_ids(9))

    def test_the_settings_are_json(self, starts):
        assert json.loads(json.dumps(list(starts.settings))) == list(starts.settings)
        assert "Starts(2 levels" in repr(starts)
