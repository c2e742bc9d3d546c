"""Replay: what a write reads again, against plain autograd; what enters the store and what leaves it."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from nested_learning.continual import Level, Replay, stack_levels
from nested_learning.continual.replaying.store import KeptExample, Store
from tests.continual.oracle import Oracle
from tests.continual.test_invariances import MODEL, assert_equal_contents, contents, learner_on
from tests.continual.tiny_models import random_ids, tiny_model

LEVELS = (Level(8, 0.1), Level(20, 0.1, rule="adam", rank=2))
SETTINGS = Replay(tokens=60, share=0.4, piece=7, seed=3)


def replaying(levels=LEVELS, replay=SETTINGS, model=MODEL, **options):
    return stack_levels(model, levels=levels, replay=replay, **{"window": 40, "overlap": 5, **options})


def store_of(learner, row=0):
    return learner.memory.rows[row].store


def listed(store):
    """Everything in a store as plain values."""
    examples = [
        (e.tokens.tolist(), e.learn.tolist(), e.start, e.source, e.label, e.begins, repr(e.loss))
        for e in store.examples
    ]
    return examples, list(store.runs), dict(store.counts), store.reason


class ReplayingOracle(Oracle):
    """Args: `replays`, what each write reads again: a list of (ids, mask) by (level, position)."""

    def __init__(self, model, levels, replays, **options):
        super().__init__(model, levels, **options)
        self.replays, self.positions = replays, [0] * len(levels)

    def _write(self, i):
        self.positions[i] += self.levels[i][0]
        for ids, mask in self.replays.get((i, self.positions[i]), ()):
            self.model.zero_grad()
            logits = self.model(ids[None, :-1]).logits[0]  # at the weights that the segment was read with
            (cross_entropy(logits, ids[1:], reduction="none") * mask[1:]).sum().backward()
            for name, total in self.sums[i].items():
                total += self.model.get_parameter(name).grad
        super()._write(i)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("choose", ["random", "surprise", "label"])
def test_against_plain_autograd(family, choose, monkeypatch):
    model = tiny_model(family)
    drawn = {}
    real = Replay.drawn

    def record(self, store, learned, chunk_start, place):
        chosen = real(self, store, learned, chunk_start, place)
        index, position = map(int, place.split("/"))
        count = sum(int(e.learn[1:].sum()) for e in chosen)
        kept = sum(e.learned for e in store.examples if e.end <= chunk_start)
        assert count == min(round(learned * 0.4 / 0.6), kept)
        drawn[index, position] = [(e.tokens.long(), e.learn) for e in chosen]
        return chosen

    monkeypatch.setattr(Replay, "drawn", record)
    levels = [Level(8, 0.1), Level(16, 0.2, layers=[1], clip=None)]
    replay = Replay(tokens=40, share=0.4, choose=choose, piece=7)
    learner = stack_levels(model, levels=levels, replay=replay)
    ids, mask = random_ids(48), random_ids(48, seed=1) > 20
    for part, (own, learn) in enumerate(zip(ids.split(12), mask.split(12), strict=True)):
        learner.observe(own, learn_mask=learn, source="ab"[part % 2], label=f"{part % 3}")
    names = [[t.name for t in writer.targets] for writer in learner.reader.writers]
    oracle = ReplayingOracle(
        model,
        [(8, 0.1, names[0], 1.0, None), (16, 0.2, names[1], None, None)],
        drawn,
    )
    oracle.observe(ids, mask.double())
    assert sum(map(len, drawn.values())) > 8
    for index in (0, 1):
        for name, delta in learner.memory.diff(level=index).items():
            torch.testing.assert_close(delta, oracle.deltas[index][name], rtol=1e-9, atol=1e-12)
    count = sum(int(learn[1:].sum()) for _, learn in drawn[0, 48])
    assert [w.replayed for w in learner.writes if (w.level, w.position) == (0, 48)] == [count]


def test_a_pass_reads_what_examples_one_by_one_teach():
    """Examples of several lengths in one batch: padding changes nothing."""
    learner = replaying(segment=8)
    learner.observe(random_ids(48))
    reader, replayer = learner.reader, learner.replayer
    with reader.workspace.installed(reader.writers, learner.memory.rows[0], learning=True) as leaves:
        examples = list(store_of(learner).examples)
        object.__setattr__(reader.plan, "segment", 1000)
        loss, grads = replayer._gradients(examples, leaves)
        alone = [replayer._gradients([example], leaves) for example in examples]
    assert loss == pytest.approx(sum(each for each, _ in alone))
    for key, g in grads.items():
        torch.testing.assert_close(g, sum(each[key] for _, each in alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choose", ["surprise", "label"])
def test_any_pieces_give_what_the_whole_gives(choose):
    replay = Replay(tokens=30, share=0.4, choose=choose, piece=7)
    ids, mask = random_ids(95), random_ids(95, seed=1) > 10
    whole, streamed = replaying(replay=replay), replaying(replay=replay)
    for start, end, source in ((0, 33, "a"), (33, 70, "b"), (70, 95, "a")):
        whole.observe(ids[start:end], learn_mask=mask[start:end], source=source)
        for first in range(start, end, 5):
            own = slice(first, min(first + 5, end))
            streamed.observe(ids[own], learn_mask=mask[own], source=source)
    assert listed(store_of(streamed)) == listed(store_of(whole))
    for level in range(2):
        for name, delta in whole.memory.diff(level=level).items():
            assert torch.equal(streamed.memory.diff(level=level)[name], delta)


def test_a_row_is_a_learner_of_its_own():
    texts = [random_ids(50, seed=seed) for seed in (0, 1)]
    batch = replaying()
    batch.observe(texts, source=["a", "b"])
    batch.observe(texts, source="c", label=["x", None])
    for index, (text, name, label) in enumerate(zip(texts, "ab", ("x", None), strict=True)):
        alone = replaying()
        alone.observe(text, source=name)
        alone.observe(text, source="c", label=label)
        assert listed(store_of(alone)) == listed(store_of(batch, index))
        assert_equal_contents(contents(alone), contents(batch, index))


def test_nothing_changes_where_nothing_is_kept_yet():
    """The first chunk of a level has nothing to replay, and no chunk is replayed into itself."""
    ids = random_ids(24)
    learner, plain = (replaying([Level(24, 0.1)], replay, segment=8) for replay in (SETTINGS, None))
    for each in (learner, plain):
        each.observe(ids)
    assert store_of(learner).tokens == 24
    assert [write.replayed for write in learner.writes] == [0]
    assert_equal_contents(contents(learner), contents(plain))
    learner.observe(ids)
    assert [write.replayed for write in learner.writes] == [round(23 * 0.4 / 0.6)]


class TestTheStore:
    def test_text_is_cut_where_its_source_begins(self):
        learner = replaying(replay=Replay(tokens=1000, piece=7))
        learner.observe(random_ids(10), source="a")
        learner.observe(random_ids(3), source="a")
        learner.observe(random_ids(9, seed=1), source="b")
        for seed in (2, 3):
            learner.observe(random_ids(5, seed=seed), label="x")  # labelled texts are not joined
        found = [(e.start, len(e), e.source, e.label, e.begins) for e in store_of(learner).examples]
        assert found == [
            (0, 7, "a", None, True),
            (7, 6, "a", None, False),
            (13, 7, "b", None, True),
            (20, 2, "b", None, False),
            (22, 5, None, "x", True),
            (27, 5, None, "x", True),
        ]

    def test_examples_hold_what_was_read(self):
        learner = replaying(replay=Replay(tokens=1000, piece=7))
        ids, mask = random_ids(48), random_ids(48, seed=1) > 30
        surprise = learner.observe(ids, learn_mask=mask)
        for e in store_of(learner).examples:
            own = slice(e.start, e.end)
            assert torch.equal(e.tokens.long(), ids[own])
            assert torch.equal(e.learn, mask[own])
            expected = torch.where(mask[own], surprise[own].nan_to_num(), 0.0).sum()
            assert e.loss == pytest.approx(float(expected))

    @pytest.mark.parametrize("choose", ["random", "surprise", "label"])
    def test_it_is_bounded(self, choose):
        learner = replaying([Level(8, 0.1)], Replay(tokens=30, choose=choose, piece=7))
        for seed in range(6):
            learner.observe(random_ids(11, seed=seed))
            assert store_of(learner).tokens <= 30
        assert store_of(learner).reason == "dropped"


def example(start, label=None, surprise=1.0, length=5, learned=5):
    learn = torch.arange(length) < learned
    return KeptExample(torch.arange(length), learn, start, None, label, True, surprise * learned)


class TestWhatIsDropped:
    def test_a_random_sample_stays(self):
        """Of 40 examples 8 stay: each of the first ten, over many seeds, as often as each of the last ten."""
        store = Store(tuple(example(5 * i) for i in range(40)))
        kept = Counter()
        for seed in range(300):
            left = Replay(tokens=40, piece=5, seed=seed).bounded(store).examples
            assert len(left) == 8
            kept.update(e.start // 50 for e in left)
        assert all(abs(kept[part] - 600) < 90 for part in range(4))  # four standard deviations

    def test_one_by_one_as_all_at_once(self):
        settings, store = Replay(tokens=40, piece=5), Store()
        everything = [example(5 * i) for i in range(40)]
        for new in everything:
            store = settings.bounded(Store((*store.examples, new)))
        at_once = settings.bounded(Store(tuple(everything)))
        assert [e.start for e in store.examples] == [e.start for e in at_once.examples]

    def test_the_least_surprising(self):
        store = Store(tuple(example(5 * i, surprise=s) for i, s in enumerate((3.0, 1.0, 2.0, 5.0))))
        left = Replay(tokens=10, piece=5, choose="surprise").bounded(store).examples
        assert [e.start for e in left] == [0, 15]

    def test_the_largest_label(self):
        store = Store(tuple(example(5 * i, label="aaaabac"[i]) for i in range(7)))
        left = Replay(tokens=20, piece=5, choose="label").bounded(store).examples
        assert Counter(e.label for e in left) == {"a": 2, "b": 1, "c": 1}

    def test_never_the_unfinished_one(self):
        store = Store(
            (*(example(5 * i, surprise=2.0) for i in range(4)), example(20, surprise=0.1, length=3))
        )
        left = Replay(tokens=10, piece=5, choose="surprise").bounded(store).examples
        assert left[-1].start == 20


class TestWhatIsDrawn:
    def count(self, store, key, **settings):
        found = Counter()
        for place in range(400):
            chosen = Replay(piece=5, share=0.5, **settings).drawn(store, 8, 10**6, str(place))
            assert len({e.start for e in chosen}) == len(chosen)
            assert sum(e.learned for e in chosen) == 8
            found.update(key(e) for e in chosen[:1])
        return found

    def test_all_alike(self):
        store = Store(tuple(example(5 * i) for i in range(4)))
        assert all(70 < count < 130 for count in self.count(store, lambda e: e.start).values())

    def test_in_proportion_to_the_surprise(self):
        store = Store((example(0, surprise=1.0), example(5, surprise=3.0), example(10, surprise=0.0)))
        found = self.count(store, lambda e: e.start, choose="surprise")
        assert 60 < found[0] < 140
        assert 260 < found[5] < 340
        assert not found[10]

    def test_labels_in_turn(self):
        store = Store(tuple(example(5 * i, label="aaaaaaab"[i]) for i in range(8)))
        found = self.count(store, lambda e: e.label, choose="label")
        assert 150 < found["a"] < 250
        chosen = Replay(piece=5, share=0.5, choose="label").drawn(store, 16, 10**6, "0")
        assert {e.label for e in chosen[:2]} == {"a", "b"}
        assert [e.label for e in chosen[2:]] == ["a", "a"]

    def test_neither_what_cannot_be_learned_nor_what_is_not_before_the_chunk(self):
        store = Store((example(0, learned=1), example(5, surprise=float("nan")), example(10), example(15)))
        chosen = Replay(piece=5, share=0.9).drawn(store, 8, 19, "0")
        assert [e.start for e in chosen] == [10]

    def test_the_last_one_is_cut(self):
        chosen = Replay(piece=5, share=0.5).drawn(Store((example(0),)), 2, 5, "0")
        assert chosen[0].tokens.tolist() == [0, 1, 2]


class TestAsAValue:
    def test_undone_by_scopes_and_snapshots(self):
        learner = replaying()
        learner.observe(random_ids(50), source="a")
        before = listed(store_of(learner))
        snapshot = learner.memory.snapshot()
        with learner.adaptation_scope():
            learner.observe(random_ids(50, seed=1), source="b")
            assert listed(store_of(learner)) != before
        assert listed(store_of(learner)) == before
        learner.memory.reset()
        assert listed(store_of(learner)) == ([], [], {}, "")
        learner.memory.restore(snapshot)
        assert listed(store_of(learner)) == before

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_go_on_alike(self, way):
        learner = replaying(model=tiny_model())
        learner.observe(random_ids(50), source="a")
        twin = way(learner)
        for each in (learner, twin):
            each.observe(random_ids(50, seed=1), source="b")
        assert listed(store_of(twin)) == listed(store_of(learner))
        assert_equal_contents(contents(twin), contents(learner))

    def test_a_failure_while_replaying_leaves_all_as_it_was(self, monkeypatch):
        learner = replaying()
        learner.observe(random_ids(20))
        before, kept = [t.clone() for t in contents(learner)], listed(store_of(learner))
        monkeypatch.setattr(type(learner.replayer), "_gradients", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.observe(random_ids(4, seed=1))
        assert_equal_contents(contents(learner), before)
        assert listed(store_of(learner)) == kept

    def test_gradient_checkpointing(self):
        plain, checkpointed = replaying(), replaying(gradient_checkpointing=True)
        for each in (plain, checkpointed):
            each.observe(random_ids(50))
        for a, b in zip(contents(plain), contents(checkpointed), strict=True):
            torch.testing.assert_close(a, b)


class TestWhatIsNotFinite:
    def test_text_that_cannot_be_read_is_kept_but_not_replayed(self):
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = float("nan")
        learner = replaying([Level(8, 0.1)], model=model)
        ids = random_ids(32) % 7
        ids[3] = 7
        with pytest.warns(RuntimeWarning, match="learned nothing"):
            learner.observe(ids)
        assert store_of(learner).examples[0].learned == 0
        assert store_of(learner).tokens == 32
        assert all(torch.isfinite(delta).all() for delta in learner.memory.diff().values())

    def test_a_replay_that_is_not_finite_leaves_the_chunk_its_own_gradient(self, monkeypatch):
        learner = replaying([Level(8, 0.1)])
        learner.observe(random_ids(16))
        monkeypatch.setattr(type(learner.replayer), "_gradients", lambda *_: (float("nan"), {}))
        learner.observe(random_ids(8, seed=1))
        assert [(w.outcome, w.replayed) for w in learner.writes] == [("written", 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1}, "tokens must be"),
        ({"tokens": 10.5}, "tokens must be a finite whole number"),
        ({"share": 0.0}, "share must be"),
        ({"share": 1.0}, "share must be"),
        ({"choose": "best"}, "choose must be one of random, surprise, label"),
        ({"piece": 1}, "piece must be"),
        ({"piece": 50, "tokens": 40}, "does not fit into a store of 40"),
        ({"seed": "x"}, "seed must be"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Replay(**options)


def test_the_budget_counts_the_store_and_longer_examples():
    learner, plain = replaying(replay=Replay(tokens=600, piece=16)), replaying(replay=None)
    learner.memory.set_rows(2)
    plain.memory.set_rows(2)
    found, without = learner.info(), plain.info()
    assert (found.store, without.store) == (600 * 2, 0)  # ids of one byte, and a mask
    assert found.activations == 2 * without.activations  # segments have 8 tokens
    assert found.total == without.total + 2 * found.store + without.activations


def test_refused():
    with pytest.raises(ValueError, match="does not fit into the window of 40"):
        replaying(replay=Replay(piece=41))
    with pytest.raises(ValueError, match="this learner keeps none"):
        learner_on().observe(random_ids(5), source="a")
    with pytest.raises(ValueError, match="replay must be a Replay"):
        replaying(replay=0.25)
    learner = replaying()
    for name in ("", 5, ["a", "b"]):
        with pytest.raises(ValueError, match="source"):
            learner.observe(random_ids(5), source=name)
    with pytest.raises(ValueError, match="3 names in label for 2"):
        learner.observe(random_ids(2, 5), label=["a", "b", "c"])
    assert learner.memory.is_empty
