"""All options of levels at once: what holds for each alone holds for them together."""

from __future__ import annotations

import pytest
import torch

from nested_learning.continual import Level, Replay, reopen, stack_levels
from tests.continual.test_invariances import assert_close_contents, assert_equal_contents, contents
from tests.continual.tiny_models import random_ids, tiny_model

MODEL = tiny_model()
EVERYTHING = {"distill": 0.3, "reread": 1, "anchor_kl": 0.1, "decay": 0.05, "rule": "adam"}
LEVELS = {
    "full": (Level(4, 0.02, **EVERYTHING), Level(8, 0.01, layers=[1]), Level(16, average_of=0, rate=0.4)),
    "sparse": (Level(4, 0.02, sparse=0.3, **EVERYTHING), Level(16, average_of=0, rate=0.4)),
    "rank": (Level(4, 0.02, rank=2, learn_down=False, **EVERYTHING), Level(16, average_of=0, rate=0.4)),
}


def learner_with(kind, **changes):
    options = {"replay": Replay(500, share=0.4, piece=6), "background": random_ids(40, seed=9)}
    return stack_levels(MODEL, levels=LEVELS[kind], window=24, overlap=5, **{**options, **changes})


@pytest.mark.parametrize("kind", LEVELS)
def test_pieces_files_and_scopes(kind, tmp_path):
    ids = random_ids(52)
    whole, streamed, resumed = learner_with(kind), learner_with(kind), learner_with(kind)
    expected = whole.observe(ids, source="a")
    found = [streamed.observe(piece, source="a") for piece in ids[:43].split([3, 17, 1, 22])]
    streamed.memory.save(tmp_path / "memory")
    resumed.memory.load(tmp_path / "memory")
    with resumed.adaptation_scope():
        resumed.observe(random_ids(30, seed=3), source="b")
        assert resumed.writes
    assert_equal_contents(contents(resumed), contents(streamed))
    found.append(resumed.observe(ids[43:], source="a"))
    torch.testing.assert_close(torch.cat(found), expected, equal_nan=True)
    assert_close_contents(contents(resumed), contents(whole))
    assert {write.reread for write in whole.writes} == {0, 1}
    assert any(write.replayed for write in whole.writes)


@pytest.mark.parametrize("kind", LEVELS)
def test_ways_out(kind, tmp_path):
    learner, probe = learner_with(kind), random_ids(14, seed=4)
    learner.observe(random_ids(43), source="a")
    learner.memory.save(tmp_path / "memory")
    again = reopen(tmp_path / "memory", MODEL, background=random_ids(40, seed=9))
    assert_equal_contents(contents(again), contents(learner))
    assert [source.kept for source in again.sources()] == [source.kept for source in learner.sources()]
    report = learner.export(tmp_path / "whole", probe=probe)  # what answers: the average in its level's place
    assert report.difference < 1e-9
    assert learner.export(tmp_path / "adapter", probe=probe, lora_rank=16).difference < 1e-9
    learner.memory.save(tmp_path / "small", dtype=torch.bfloat16)
    learner.memory.load(tmp_path / "small")
    torch.testing.assert_close(learner.score(probe), again.score(probe), rtol=0.05, atol=0.05, equal_nan=True)
    learner.observe(random_ids(20, seed=8))  # and it reads on


@pytest.mark.parametrize("kind", LEVELS)
def test_what_is_forgotten_was_never_read(kind):
    first, second, third = (random_ids(n, seed=n) for n in (13, 18, 21))
    forgetful, innocent = learner_with(kind), learner_with(kind)
    for ids, source in ((first, "a"), (second, "b"), (third, "a")):
        forgetful.observe(ids, source=source)
    report = forgetful.forget("b")
    assert report.carried == ()
    for ids in (first, third):
        innocent.observe(ids, source="a")
    assert_equal_contents(contents(forgetful), contents(innocent))


@pytest.mark.parametrize("kind", LEVELS)
def test_the_average_leaves_learning_alone(kind):
    ids = random_ids(40)
    alone = stack_levels(
        MODEL,
        levels=[level for level in LEVELS[kind] if level.average_of is None],
        window=24,
        overlap=5,
        replay=Replay(500, share=0.4, piece=6),
        background=random_ids(40, seed=9),
    )
    both = learner_with(kind)
    assert torch.equal(both.observe(ids)[1:], alone.observe(ids)[1:])
    other = random_ids(12, seed=5)
    assert not torch.equal(both.score(other)[1:], both.score(other, levels=range(len(alone.levels)))[1:])
    assert torch.equal(both.score(other, levels=range(len(alone.levels)))[1:], alone.score(other)[1:])
