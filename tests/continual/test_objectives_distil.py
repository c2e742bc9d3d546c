"""Distillation at the end of a window against a loop written out; invariances; files; what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.objectives.answers import KeptAnswers
from tests.continual.objectives_oracle import ObjectivesOracle
from tests.continual.test_invariances import assert_close_contents, assert_equal_contents
from tests.continual.test_objectives_again import (
    assert_learned_alike,
    check_pieces,
    kept,
    oracle_level,
    rows_and_a_file,
)
from tests.continual.tiny_models import VOCAB, random_ids, tiny_model
from tests.damage import read_file, write_checked

MODEL = tiny_model()
LEVELS = (
    Level(4, 0.3, distill=0.5, rule="adam"),
    Level(10, 0.2, layers=[1], distill=2.0, decay=0.1, reread=1),
    Level(30, 0.2, rank=2, distill=1.0, gate_quantile=0.1),
)
READING = {"segment": 3, "window": 20, "overlap": 5, "distill_top_k": 7}


def learner_on(levels=LEVELS, **reading):
    return stack_levels(MODEL, levels=levels, **{**READING, **reading})


def everything(learner):
    """Contents of a row with the answers that are kept, and what was distilled and is not yet written."""
    row = learner.memory.rows[0]
    found = kept(learner) + (list(vars(row.answers).values()) if row.answers else [])
    return found + [t for state in row.levels for _, t in sorted(state.distilled.items())]


@pytest.mark.parametrize(("masked", "top_k"), [(False, 7), (True, VOCAB)])
def test_levels_learn_what_the_closed_window_made_the_model_answer(masked, top_k):
    """Windows that close at boundaries of levels and between them; full and low-rank levels."""
    levels = [
        Level(4, 0.3),
        Level(10, 0.2, layers=[1], clip=None, distill=2.0),
        Level(30, 0.2, rank=2, distill=1.0),
    ]
    learner = learner_on(levels, distill_top_k=top_k)
    states = [oracle_level(learner, i, distill=level.distill) for i, level in enumerate(levels)]
    oracle = ObjectivesOracle(MODEL, states, 3, 20, 5, top_k=top_k)
    ids = random_ids(60)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(2)) < (0.5 if masked else 2.0)
    expected = oracle.observe(ids, mask)
    torch.testing.assert_close(learner.observe(ids, learn_mask=mask), expected, equal_nan=True)
    assert_learned_alike(learner, oracle)


def test_all_values_but_one_give_the_divergence_over_the_vocabulary():
    teacher, student = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(KeptAnswers.of(teacher, 8).divergence(student), full)
    torch.testing.assert_close(KeptAnswers.of(teacher, 100).divergence(student), full)
    fewer = [KeptAnswers.of(teacher, k).divergence(student) for k in (1, 3, 8)]
    assert (fewer[0] < fewer[1]).all()
    assert (fewer[1] < fewer[2]).all()


def test_what_the_first_half_said_is_answered_better_without_it():
    """One pair of windows, told apart by the level's λ alone: less divergence after the write."""
    ids, divergences = random_ids(20), []
    for weight in (0.0, 3.0):
        levels = [Level(4, 1e-9, distill=1e-9), Level(20, 0.3, distill=weight)]
        learner = learner_on(levels, window=20, distill_top_k=VOCAB)
        learner.observe(ids)
        assert learner.memory.rows[0].position == 20
        with torch.no_grad():
            full = MODEL(ids[None, :-1]).logits[0].log_softmax(-1)[-8:]
            alone = learner.logits(ids[None, -8 - 5 : -1])[0].log_softmax(-1)[-8:]
        divergences.append(float((full.exp() * (full - alone)).sum()))
    assert divergences[1] < divergences[0]


def test_a_window_distils_even_into_a_chunk_without_tokens_to_learn():
    """The half window's tokens were to be learned, those of the next chunk are not: the level writes."""
    learner = learner_on([Level(3, 1e-9), Level(24, 0.3, distill=1.0)], window=20)
    mask = torch.ones(48, dtype=torch.bool)
    mask[24:] = False
    learner.observe(random_ids(48), learn_mask=mask)
    outcomes = [write.outcome for write in learner.writes if write.level == 1]
    assert outcomes[0] == "written"
    learner = learner_on([Level(3, 1e-9), Level(24, 0.3)], window=20, distill_top_k=None)
    learner.observe(random_ids(48), learn_mask=mask)
    assert [write.outcome for write in learner.writes if write.level == 1] == ["written", "masked"]


def test_the_way_in_which_a_text_comes_does_not_matter():
    check_pieces(learner_on, everything)


@pytest.mark.parametrize("length", [17, 43])
def test_rows_scopes_copies_and_files_go_on_alike(tmp_path, length):
    learner, alone, loaded, more = rows_and_a_file(learner_on, everything, length, tmp_path / "memory")
    expected = learner.observe(more)
    for other in (loaded, copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        given = more if other is loaded else more[0]
        torch.testing.assert_close(other.observe(given), expected if other is loaded else expected[0])
        assert_equal_contents(everything(other), everything(learner))


def test_files_of_other_settings_or_with_other_answers_are_refused(tmp_path):
    path = tmp_path / "memory"
    learner = learner_on()
    learner.observe(random_ids(18))
    learner.memory.save(path)
    with pytest.raises(ValueError, match="other reading"):
        learner_on(distill_top_k=8).memory.load(path)
    tensors, metadata = read_file(path)
    assert tensors["0/answers/ids"].shape == (6, 7)
    for name, value, message in (
        ("rest", tensors["0/answers/rest"][1:], "rest is"),
        ("ids", tensors["0/answers/ids"] + VOCAB, "not in the vocabulary"),
        ("log_probs", -tensors["0/answers/log_probs"], "expected logarithms"),
    ):
        write_checked(path, {**tensors, f"0/answers/{name}": value}, metadata)
        with pytest.raises(ValueError, match=message):
            learner_on().memory.load(path)


def test_a_window_that_is_not_finite_teaches_nothing():
    model = copy.deepcopy(MODEL)
    learner = stack_levels(model, levels=[Level(3, 0.1), Level(24, 0.1, distill=1.0)], **READING)
    learner.observe(random_ids(15))
    assert len(learner.memory.rows[0].answers) == 3
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        before, weight[5] = weight[5].clone(), float("nan")
        with pytest.warns(RuntimeWarning, match="learned nothing"):
            learner.observe(torch.full((3,), 5))
        weight[5] = before
    row = learner.memory.rows[0]
    assert row.answers is None
    assert not row.levels[1].distilled


@pytest.mark.parametrize("work", ["distil", "pulls"])
def test_an_interrupted_reading_leaves_the_row_as_it_was(monkeypatch, work):
    """At the boundary of a window; what comes again is read as if nothing had happened."""

    def interrupt(*args):
        raise KeyboardInterrupt

    ids = random_ids(24)
    learner, whole = learner_on(), learner_on()
    learner.observe(ids[:16])
    before = everything(learner)
    with monkeypatch.context() as patch:
        patch.setattr(f"nested_learning.continual.study.{work}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learner.observe(ids[16:])
    position = learner.memory.rows[0].position
    if position == 16:
        assert_equal_contents(everything(learner), before)
    learner.observe(ids[position:])
    whole.observe(ids)
    assert_close_contents(everything(learner), everything(whole))


@pytest.mark.parametrize(
    ("level", "reading", "message"),
    [
        ({"distill": -1.0}, {}, "distill must be a finite number >= 0"),
        ({"lr": 0.0, "distill": 1.0}, {}, "distill is 1.0, but with lr=0 the level learns nothing"),
        ({}, {}, "distill_top_k is 7, but no level distils"),
        ({"distill": 1.0}, {"distill_top_k": 0}, "distill_top_k must be a finite whole number >= 1"),
        ({"distill": 1.0}, {"window": 11}, "the window must hold four segments.*window=11, segment=3"),
        ({"distill": 1.0}, {"overlap": 10}, "overlap must be less than half of it.*overlap=10"),
    ],
)
def test_refusals(level, reading, message):
    with pytest.raises(ValueError, match=message):
        learner_on([Level(**{"chunk_size": 4, "lr": 0.1, **level})], **reading)
