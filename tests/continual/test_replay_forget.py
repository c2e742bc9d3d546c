"""Sources and forgetting: exact where the store holds all that was read, and said so where it does not."""

from __future__ import annotations

import pytest
import torch

from nested_learning.continual import Level, Replay, stack_levels
from tests.continual.test_invariances import MODEL, assert_equal_contents, contents, learner_on
from tests.continual.test_replay_learning import listed, store_of
from tests.continual.tiny_models import random_ids

LEVELS = (Level(8, 0.1, rule="momentum"), Level(20, 0.1, rank=2))
WHOLE = Replay(tokens=500, share=0.4, piece=7)
SMALL = Replay(tokens=30, share=0.4, piece=7)
TEXTS = (("a", 21), ("b", 18), ("a", 9), (None, 13), ("c", 12), ("b", 7), ("a", 6))


def learner_of(replay=WHOLE, levels=LEVELS):
    return stack_levels(MODEL, levels=levels, window=40, overlap=5, replay=replay)


def read(learner, leave_out=(), row=None):
    """Read TEXTS, each with a mask of its own, but for the sources to be left out."""
    for seed, (source, length) in enumerate(TEXTS):
        if source not in leave_out:
            mask = random_ids(length, seed=seed + 50) > 10
            label = "x" if seed % 3 else None
            learner.observe(
                random_ids(length, seed=seed), learn_mask=mask, source=source, label=label, row=row
            )
    return learner


def assert_alike(first, second, row=0):
    assert_equal_contents(contents(first, row), contents(second, row))
    assert listed(store_of(first, row)) == listed(store_of(second, row))


class TestExact:
    @pytest.mark.parametrize("source", ["a", "b", None])
    def test_as_a_learner_that_never_read_it(self, source):
        """Bit for bit, and it goes on alike: weights, sums, rules' states, window, store."""
        learner, other = read(learner_of()), read(learner_of(), leave_out=[source])
        kept = sum(length for name, length in TEXTS if name == source)
        report = learner.forget(source)
        assert (report.source, report.tokens, report.rows, report.carried) == (source, kept, (0,), ())
        assert "as if it had never been read" in str(report)
        assert_alike(learner, other)
        assert source not in {known.name for known in learner.sources()}
        for each in (learner, other):
            each.observe(random_ids(30, seed=9), source="d")
        assert_alike(learner, other)

    def test_all_of_it_one_after_the_other(self):
        learner = read(learner_of())
        for source in ("b", "c", None, "a"):
            assert not learner.forget(source).carried
        assert_alike(learner, learner_of())

    def test_after_saving_and_loading(self, tmp_path):
        read(learner_of()).memory.save(tmp_path / "m")
        learner, other = learner_of(), read(learner_of(), leave_out=["b"])
        learner.memory.load(tmp_path / "m")
        assert not learner.forget("b").carried
        assert_alike(learner, other)

    def test_one_row_alone(self):
        learner, alone = learner_of(), read(learner_of(), leave_out=["b"])
        learner.memory.set_rows(2)
        for row in (0, 1):
            read(learner, row=row)
        untouched = [t.clone() for t in contents(learner, 1)]
        assert learner.forget("b", row=0).rows == (0,)
        assert_alike(learner, alone)
        assert_equal_contents(contents(learner, 1), untouched)
        assert learner.forget("b").rows == (1,)

    def test_undone_by_a_scope_and_after_a_failure(self, monkeypatch):
        learner = read(learner_of())
        before, kept = [t.clone() for t in contents(learner)], listed(store_of(learner))
        with learner.adaptation_scope():
            learner.forget("a")
        monkeypatch.setattr(type(learner.reader), "read_segment", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.forget("a")
        assert_equal_contents(contents(learner), before)
        assert listed(store_of(learner)) == kept


def carried(learner, source, why):
    before = learner.memory.diff()
    report = learner.forget(source)
    assert report.carried == (0,)
    for part in (why, "still carry it", "restoring a snapshot", "reset()"):
        assert part in report.message
    for name, delta in learner.memory.diff().items():
        assert torch.equal(delta, before[name])
    assert all(e.source != source for e in store_of(learner).examples)
    return report


class TestCarried:
    def test_what_waits_to_be_read_again_goes(self):
        """Neither at a boundary, by `Level.reread`, nor in the file: the weights alone carry it."""
        learner = learner_of(SMALL, [Level(8, 0.1), Level(32, 0.1, reread=1)])
        read(learner)
        secret = random_ids(20, seed=77)
        learner.observe(secret, source="secret")
        row = learner.memory.rows[0]
        assert torch.equal(row.levels[1].read.tokens[-10:], secret[-10:])
        carried(learner, "secret", "dropped examples")
        kept = [state.read for state in learner.memory.rows[0].levels]
        assert kept == [None, None]
        learner.observe(random_ids(40, seed=3))
        assert any(write.reread for write in learner.writes)

    def test_the_store_was_full(self):
        learner = read(learner_of(SMALL))
        kept = sum(len(e) for e in store_of(learner).examples if e.source == "a")
        pending = learner.memory.rows[0].position % 8 and 6
        assert carried(learner, "a", "dropped examples").tokens == kept + pending
        source = next(each for each in learner.sources() if each.name == "a")
        assert (source.tokens, source.kept) == (36, 0)  # it was read, and that is not forgotten
        learner.observe(random_ids(50))

    def test_its_text_leaves_the_window(self, tmp_path):
        """Nothing of its tokens is in the file, and those that were to be learned are not."""
        learner = learner_of(SMALL)
        learner.observe(random_ids(60) % 30, source="a")
        secret = 30 + random_ids(20) % 30
        learner.observe(secret[:19], source="secret")  # seven of them wait for the end of their segment
        learner.forget("secret")
        learner.memory.save(tmp_path / "m")
        loaded = learner_of(SMALL)
        loaded.memory.load(tmp_path / "m")
        row = loaded.memory.rows[0]
        assert not set(row.tokens.tolist()) & set(range(30, 60))
        assert not row.learn.any()
        assert len(row.tokens) == 7
        for each in (learner, loaded):
            each.observe(random_ids(30))
        assert_alike(learner, loaded)

    def test_a_level_was_reset(self):
        learner = read(learner_of())
        learner.memory.reset(level=1)
        carried(learner, "a", "a level was reset")

    def test_another_source_was_struck_out(self):
        learner = read(learner_of())
        learner.memory.reset(level=1)
        learner.forget("a")
        carried(learner, "b", "a level was reset")

    def test_nothing_was_kept_at_first(self, tmp_path):
        learner = learner_on(levels=LEVELS, window=40)
        learner.observe(random_ids(21))
        learner.memory.save(tmp_path / "m")
        late = learner_of()
        late.memory.load(tmp_path / "m")
        late.observe(random_ids(19, seed=1), source="a")
        assert [(s.name, s.tokens) for s in late.sources()] == [(None, 21), ("a", 19)]
        assert store_of(late).tokens == 20  # from the unfinished segment on
        carried(late, "a", "nothing was kept when the text began")


class TestSources:
    def test_tokens_writes_and_what_is_kept(self):
        learner = learner_of(levels=[Level(8, 0.1), Level(16, 0.1)])
        learner.observe(random_ids(12), source="a")
        learner.observe(random_ids(24), source="b")
        # at 8, 16: a in the chunks of level 0; at 16 in that of level 1; from 16 on it is replayed or not
        found = {s.name: (s.tokens, s.kept) for s in learner.sources()}
        assert found == {"a": (12, 12), "b": (24, 20)}
        without = learner_of(Replay(tokens=500, share=1e-6, piece=7), levels=[Level(8, 0.1), Level(16, 0.1)])
        without.observe(random_ids(12), source="a")
        without.observe(random_ids(24), source="b")
        assert {s.name: s.writes for s in without.sources()} == {"a": 3, "b": 5}
        assert all(s.writes >= 3 for s in learner.sources())

    def test_a_replayed_source_went_into_the_write(self):
        learner = learner_of(levels=[Level(8, 0.1)])
        learner.observe(random_ids(8), source="a")
        learner.observe(random_ids(8), source="b")
        assert {s.name: s.writes for s in learner.sources()} == {"a": 2, "b": 1}

    def test_by_row(self):
        learner = learner_of()
        learner.observe(random_ids(2, 9), source=["a", "b"])
        assert [s.name for s in learner.sources()] == ["a", "b"]
        assert [s.name for s in learner.sources(row=1)] == ["b"]

    def test_none_where_nothing_is_kept(self):
        learner = learner_on()
        learner.observe(random_ids(9))
        assert learner.sources() == []


def test_refused():
    learner = read(learner_of())
    with pytest.raises(ValueError, match=r"unknown source 'd'.*Known: a, b, c"):
        learner.forget("d")
    with pytest.raises(ValueError, match="row must be"):
        learner.forget("a", row=1)
    learner.memory.drop_stores()
    with pytest.raises(ValueError, match="unknown source 'a'"):
        learner.forget("a")
    learner.observe(random_ids(9), source="a")  # nothing is kept any more
    assert learner.sources() == []
