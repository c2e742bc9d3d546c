"""Re-reading against a loop written out; what must not matter to it; files; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.adaptation import Adapter
from tests.continual.objectives_oracle import ObjectivesOracle, OracleLevel
from tests.continual.test_invariances import assert_close_contents, assert_equal_contents, contents
from tests.continual.tiny_models import random_ids, tiny_model

MODEL = tiny_model()
LEVELS = (
    Level(4, 0.3, reread=1),
    Level(10, 0.2, layers=[1], rule="momentum", decay=0.1, gate_quantile=0.3, reread=2),
    Level(30, 0.2, rank=2, reread=1),
)
READING = {"segment": 3, "window": 14, "overlap": 5}


def learner_on(model=MODEL, levels=LEVELS):
    return stack_levels(model, levels=levels, **READING)


def kept(learner):
    """Contents of a row, the tokens that are kept for re-reading included."""
    read = [state.read for state in learner.memory.rows[0].levels]
    return contents(learner) + [t for p in read if p is not None for t in (p.tokens, p.learn)]


def oracle_level(learner, index, **options):
    """The level with the initial factors of the learner, which hang on its seed alone."""
    writer = learner.reader.writers[index]
    level, factors = writer.level, {}
    for target in writer.targets:
        if level.rank is None:
            factors[target.name] = [torch.zeros_like(target.weight)]
        else:
            factors[target.name] = [t.clone() for t in writer.initial_factors(target, writer.level.rank)]
    return OracleLevel(level.chunk_size, level.lr, factors, level.clip, level.reread, **options)


def assert_learned_alike(learner, oracle):
    for i, level in enumerate(oracle.levels):
        found = learner.memory.diff(level=i)
        for name in level.factors:
            torch.testing.assert_close(found[name], level.delta(name).detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_are_read_again_at_the_weights_they_made(masked):
    """Full and low-rank levels, chunks that do not divide each other and are longer than the window."""
    levels = [Level(4, 0.3, reread=2), Level(10, 0.2, layers=[1], clip=0.5), Level(30, 0.2, rank=2, reread=1)]
    learner = learner_on(levels=levels)
    oracle = ObjectivesOracle(MODEL, [oracle_level(learner, i) for i in range(3)], 3, 14, 5)
    ids = random_ids(60)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(2)) < (0.5 if masked else 2.0)
    expected = oracle.observe(ids, mask)
    surprise = learner.observe(ids, learn_mask=mask)
    torch.testing.assert_close(surprise, expected, equal_nan=True)
    assert_learned_alike(learner, oracle)
    again = [write for write in learner.writes if write.reread]
    assert [write.loss for write in again] == pytest.approx(oracle.losses_read_again)
    last = [(w.level, w.reread) for w in again if w.position == 60]
    assert last == ([(2, 1)] if masked else [(0, 1), (0, 2), (2, 1)])  # the mask hides the last chunk of 4


def test_once_read_again_the_chunk_is_less_surprising():
    learner = learner_on(levels=[Level(10, 0.05, clip=None, reread=3)])
    learner.observe(random_ids(10))
    losses = [write.loss for write in learner.writes]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4


def check_pieces(learner_on, everything):
    """A text in pieces teaches what the whole teaches; `everything` gives the contents of a learner."""
    ids, mask, pieces = random_ids(75), random_ids(75, seed=3) > 20, [1, 12, 9, 30, 2, 21]
    whole, streamed = learner_on(), learner_on()
    surprise = whole.observe(ids, learn_mask=mask)
    parts = zip(ids.split(pieces), mask.split(pieces), strict=True)
    found = torch.cat([streamed.observe(part, learn_mask=shown) for part, shown in parts])
    torch.testing.assert_close(found, surprise, equal_nan=True)
    assert_close_contents(everything(streamed), everything(whole))


def rows_and_a_file(learner_on, everything, length, path):
    """(a learner of two rows, one of the first row, one that loaded the first's file, ids to go on with)."""
    first, more = random_ids(2, length), random_ids(2, 17, seed=1)
    learner, alone, loaded = learner_on(), learner_on(), learner_on()
    learner.observe(first)
    alone.observe(first[0])
    before = everything(learner)
    assert_equal_contents(before, everything(alone))
    with learner.adaptation_scope():
        learner.observe(more)
    assert_equal_contents(everything(learner), before)
    learner.memory.save(path)
    loaded.memory.load(path)
    assert_equal_contents(everything(loaded), before)
    return learner, alone, loaded, more


def test_the_way_in_which_a_text_comes_does_not_matter():
    check_pieces(learner_on, kept)


def test_rows_scopes_copies_and_files_go_on_alike(tmp_path):
    learner, _, loaded, more = rows_and_a_file(learner_on, kept, 43, tmp_path / "memory")
    copies = [loaded, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    expected = learner.observe(more)
    for other in copies:
        assert torch.equal(other.observe(more), expected)
        assert_equal_contents(kept(other), kept(learner))
    with pytest.raises(ValueError, match="other levels"):
        learner_on(levels=[Level(4, 0.3), *LEVELS[1:]]).memory.load(tmp_path / "memory")


def test_nothing_of_before_a_reset_is_read_again():
    """A level that forgets in the middle of its chunk goes over the rest of it alone."""
    learner = learner_on(levels=[Level(4, 1e-9), Level(12, 0.3, reread=1)])
    ids = random_ids(12)
    learner.observe(ids[:8])
    learner.memory.reset(level=1)
    learner.observe(ids[8:])
    assert len(learner.memory.rows[0].levels[1].read) == 4
    assert [write.outcome for write in learner.writes if write.level == 1] == ["written", "written"]


def test_what_is_gated_or_masked_is_not_read_again():
    learner = learner_on(levels=[Level(4, 0.3, gate=100.0, reread=2), Level(8, 0.3, reread=2)])
    learner.observe(random_ids(8), learn_mask=[False] * 8)
    assert [write.outcome for write in learner.writes] == ["masked"] * 3
    learner.observe(random_ids(8))
    assert [(w.level, w.outcome, w.reread) for w in learner.writes] == [
        (0, "gated", 0),
        (0, "gated", 0),
        (1, "written", 0),
        (1, "written", 1),
        (1, "written", 2),
    ]


def test_adaptation_reads_again_and_counts_no_second_reading():
    """Losses are those of `observe`; the outer gradient is that of first readings alone."""
    learner = learner_on(levels=[Level(4, 0.3, reread=1)])
    ids, model = random_ids(1, 12), copy.deepcopy(MODEL)
    twin = learner_on(model, [Level(4, 0.3, reread=1)])
    loss = Adapter(twin).backward(ids)
    surprise = learner.observe(ids[0])
    assert float(loss) == pytest.approx(float(surprise[1:].mean()))
    still = copy.deepcopy(MODEL)
    Adapter(learner_on(still, [Level(12, 1e-12)])).backward(ids[:, :4])
    Adapter(learner_on(model_alone := copy.deepcopy(MODEL), [Level(4, 0.3, reread=1)])).backward(ids[:, :4])
    for name, parameter in model_alone.named_parameters():
        torch.testing.assert_close(parameter.grad, still.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


def test_a_re_reading_that_is_not_finite_is_dropped():
    """With the token that is NaN only in the weights of after the first write."""
    learner = learner_on(levels=[Level(8, 1e200, clip=None, reread=3)])
    with pytest.warns(
        RuntimeWarning, match="level 0 learned nothing from re-reading 1 of the chunk that ends at"
    ):
        learner.observe(random_ids(8))
    assert [(write.outcome, write.reread) for write in learner.writes] == [("written", 0), ("dropped", 1)]


def test_gradient_checkpointing_changes_nothing():
    levels, ids = [Level(8, 0.3, reread=2)], random_ids(24)
    plain = stack_levels(MODEL, levels=levels, **READING)
    saving = stack_levels(MODEL, levels=levels, **READING, gradient_checkpointing=True)
    plain.observe(ids)
    saving.observe(ids)
    assert_close_contents(kept(saving), kept(plain))


@pytest.mark.parametrize("options", [{"reread": -1}, {"reread": 1.5}, {"reread": True}])
def test_a_number_of_times_is_expected(options):
    with pytest.raises(ValueError, match="reread must be a finite whole number >= 0, got"):
        Level(4, 0.1, **options)


def test_a_level_that_does_not_learn_reads_nothing_again():
    with pytest.raises(ValueError, match="reread is 1, but with lr=0 the level learns nothing"):
        Level(4, 0.0, reread=1)
