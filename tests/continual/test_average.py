"""Averages that answer: what they hold, where they stand, and that no level learns otherwise."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.func import functional_call

from nested_learning.cli.level_flags import add_level_flags, levels_of
from nested_learning.cli.parsing import new_parser, parse
from nested_learning.continual import Level, stack_levels
from nested_learning.levels import levels as nested_system
from tests.continual.test_invariances import assert_equal_contents, contents
from tests.continual.test_memory_file import rewrite
from tests.continual.tiny_models import random_ids, tiny_model

MODEL = tiny_model()
PROBE = random_ids(1, 12, seed=5)
FORMS = {
    "full": {},
    "rank": {"rank": 3},
    "fixed": {"rank": 3, "learn_down": False},
    "sparse": {"sparse": 0.2},
}


def learner_on(*levels, model=MODEL, **options):
    return stack_levels(model, levels=levels, **options)


def averaging(form="full", model=MODEL, layers="all", **options):
    """Levels of chunk 4 and 16 that learn, each followed by an average, the first by two."""
    return learner_on(
        Level(4, 0.3, rule="adam", clip=0.5, **FORMS[form]),
        Level(8, average_of=0, rate=0.25, layers=layers),
        Level(16, 0.2, **FORMS[form]),
        Level(32, average_of=0, rate=0.5, layers=layers),
        Level(48, average_of=2, rate=1.0, layers=layers),
        model=model,
        **options,
    )


def plain(form="full", model=MODEL):
    return learner_on(
        Level(4, 0.3, rule="adam", clip=0.5, **FORMS[form]), Level(16, 0.2, **FORMS[form]), model=model
    )


def assert_same_weights(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, **tolerance)


def logits_at(*deltas, model=MODEL):
    """Logits of `PROBE` at W_base + Σ deltas, by functional_call."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in deltas:
        for name, delta in each.items():
            weights[name] += delta
    return functional_call(model, weights, (PROBE,)).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_levels_learn_as_if_there_were_no_average(family, form):
    """Bit for bit, surprise included: also a level whose index an average has moved."""
    model = tiny_model(family)
    learner, alone = averaging(form, model), plain(form, model)
    for piece in random_ids(57).split(37):
        assert torch.equal(learner.observe(piece)[1:], alone.observe(piece)[1:])
        learner.logits(PROBE)
    for index, twin in ((0, 0), (2, 1)):
        state, other = learner.memory.rows[0].levels[index], alone.memory.rows[0].levels[twin]
        for mine, theirs in ((state.deltas, other.deltas), (state.sums, other.sums)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[slot], theirs[slot]) for slot in mine)
        assert state.deltas


class TestWhatItHolds:
    """Against the sum that the definition says, over deltas that a learner without averages had."""

    @pytest.mark.parametrize("form", ["full", "fixed", "sparse"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_exactly(self, family, form):
        model = tiny_model(family)
        learner, alone = averaging(form, model), plain(form, model)
        expected = {1: {}, 3: {}, 4: {}}
        for end, piece in enumerate(random_ids(64).split(4), 1):
            learner.observe(piece)
            alone.observe(piece)
            for index, chunk, rate, of in ((1, 8, 0.25, 0), (3, 32, 0.5, 0), (4, 48, 1.0, 1)):
                if 4 * end % chunk == 0:
                    for name, delta in alone.memory.diff(level=of).items():
                        expected[index][name] = rate * delta + (1 - rate) * expected[index].get(name, 0)
            for index, average in expected.items():
                assert_same_weights(learner.memory.diff(level=index), average, rtol=1e-9, atol=1e-12)
        assert {write.truncation for write in learner.writes} == {0.0}

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("rank", [2, 3, 5])
    def test_at_a_rank_by_the_best_approximation(self, family, rank):
        model = tiny_model(family)
        fast = Level(4, 0.9, rank=3)
        learner = learner_on(fast, Level(8, average_of=0, rate=0.25, rank=rank), model=model)
        alone = learner_on(fast, model=model)
        average = {}
        for piece in random_ids(40).split(8):
            learner.observe(piece)
            alone.observe(piece)
            lost = whole = 0.0
            for name, delta in alone.memory.diff().items():
                exact = 0.25 * delta + 0.75 * average.get(name, 0)
                u, values, v = torch.linalg.svd(exact, full_matrices=False)
                average[name] = u[:, :rank] * values[:rank] @ v[:rank]
                lost += (exact - average[name]).square().sum()
                whole += exact.square().sum()
            assert_same_weights(learner.memory.diff(level=1), average, rtol=1e-7, atol=1e-10)
            found = [write.truncation for write in learner.writes if write.level == 1]
            assert found == pytest.approx([(lost / whole).sqrt().item()], abs=1e-7)
        assert rank == 5 or lost / whole > 1e-6
        down = learner.memory.rows[0].levels[1].deltas[f"{next(iter(average))}:down"]
        assert down.shape[0] == rank

    def test_another_rank_than_that_of_a_level_with_a_fixed_factor(self):
        fast = Level(4, 0.3, rank=2, learn_down=False)
        learner = learner_on(fast, Level(8, average_of=0, rate=1.0, rank=4))
        learner.observe(random_ids(24))
        assert_same_weights(learner.memory.diff(level=1), learner.memory.diff(level=0))

    @pytest.mark.parametrize("form", FORMS)
    def test_a_level_that_was_reset_counts_as_zero(self, form):
        learner = learner_on(Level(4, 0.3, gate=0.0, **FORMS[form]), Level(8, average_of=0, rate=0.25))
        learner.observe(random_ids(8))
        before = learner.memory.diff(level=1)
        learner.memory.reset(level=0)
        assert_same_weights(learner.memory.diff(level=1), before)
        state = learner.memory.rows[0].levels
        writer = learner.reader.writers[1]
        writer.average(state[1], writer.averaged, state[0])
        assert_same_weights(learner.memory.diff(level=1), {n: 0.75 * d for n, d in before.items()})

    def test_a_chunk_that_writes_nothing_leaves_it(self):
        learner = learner_on(Level(4, 0.3), Level(8, average_of=0, rate=0.5))
        learner.observe(random_ids(8))
        before = learner.memory.diff(level=1)
        learner.observe(random_ids(8, seed=1), learn_mask=[0] * 8)
        assert [write.outcome for write in learner.writes] == ["masked"] * 3
        assert_same_weights(learner.memory.diff(level=1), before, rtol=0, atol=0)

    def test_it_is_taken_after_a_slower_level_has_taken_over(self):
        learner = learner_on(Level(4, 0.3), Level(8, average_of=0, rate=1.0), Level(16, 0.0, consolidate=0.5))
        learner.observe(random_ids(16))
        fast, average, slow = (learner.memory.diff(level=i) for i in range(3))
        assert_same_weights(slow, fast)  # half of it moved
        assert_same_weights(average, {name: 2 * delta for name, delta in fast.items()})
        learner.observe(random_ids(8, seed=1))
        assert_same_weights(learner.memory.diff(level=1), learner.memory.diff(level=0))


@pytest.fixture(scope="module")
def asked():
    """Learners that have read and learn nothing more, by form; their averages have the second layer alone."""
    learners = {form: averaging(form, layers=[1]) for form in FORMS}
    for learner in learners.values():
        learner.observe(random_ids(60))
    return learners


@pytest.mark.parametrize("form", FORMS)
class TestAnswers:
    @pytest.fixture
    def learner(self, form, asked):
        return asked[form]

    def test_by_the_slowest_average_on_the_weights_that_it_has(self, learner):
        deltas = [learner.memory.diff(level=i) for i in range(5)]
        assert {name.split(".")[2] for name in deltas[3]} == {"1"}
        outside = [{n: d for n, d in deltas[i].items() if ".0." in n} for i in (0, 2)]
        expected = logits_at(deltas[3], deltas[4], *outside)
        torch.testing.assert_close(learner.logits(PROBE), expected)
        total = learner.memory.diff()
        torch.testing.assert_close(logits_at(total), expected)
        with learner.active() as model:
            torch.testing.assert_close(model(PROBE).logits, expected)
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], PROBE[0, 1:])
        torch.testing.assert_close(learner.score(PROBE[0])[1:].mean(), loss)
        assert learner.perplexity(PROBE[0]) == pytest.approx(loss.exp().item())
        longer = learner.generate(PROBE, max_new_tokens=1, do_sample=False)
        assert longer[0, -1] == expected[0, -1].argmax()

    @pytest.mark.parametrize("chosen", [[0], [1], [3], [4, 0], [2, 1], []])
    def test_by_whom_one_asks(self, learner, chosen):
        expected = logits_at(*(learner.memory.diff(level=i) for i in chosen))
        torch.testing.assert_close(learner.logits(PROBE, levels=chosen), expected)
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], PROBE[0, 1:])
        assert learner.perplexity(PROBE[0], levels=chosen) == pytest.approx(loss.exp().item())

    @pytest.mark.parametrize("chosen", [[0, 1], [1, 3], [2, 4], [0, 2, 3]])
    def test_not_by_a_level_and_its_average(self, learner, chosen):
        for ask in (learner.logits, learner.score, learner.generate):
            with pytest.raises(ValueError, match="a level and its average, or two averages of one level"):
                ask(PROBE, levels=chosen)

    def test_nothing_answers_before_its_first_boundary(self, form, learner):
        learner = averaging(form)
        learner.observe(random_ids(7))
        assert learner.memory.diff(level=0)
        assert torch.equal(learner.logits(PROBE), MODEL(PROBE).logits)


@pytest.mark.parametrize("form", FORMS)
class TestMemory:
    def test_goes_on_after_loading(self, form, tmp_path):
        first, second = averaging(form), averaging(form)
        for learner in (first, second):
            learner.observe(random_ids(2, 37))
        first.memory.save(tmp_path / "m")
        loaded = averaging(form, seed=8)  # factors are those of the file
        loaded.memory.load(tmp_path / "m")
        assert torch.equal(loaded.logits(PROBE, row=1), second.logits(PROBE, row=1))
        assert torch.equal(
            loaded.observe(random_ids(2, 30, seed=1)), second.observe(random_ids(2, 30, seed=1))
        )
        for row in (0, 1):
            assert_equal_contents(contents(loaded, row), contents(second, row))

    def test_pieces_rows_scopes_and_copies(self, form):
        ids = random_ids(2, 50)
        rows, whole = averaging(form), averaging(form)
        rows.observe(ids)
        whole.observe(ids[1])
        assert_equal_contents(contents(rows, 1), contents(whole))
        streamed = averaging(form)
        for piece in ids[1].split([5, 19, 3, 23]):
            streamed.observe(piece)
        for a, b in zip(contents(streamed), contents(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        before = [t.clone() for t in contents(whole)]
        with whole.adaptation_scope():
            whole.observe(ids[0])
        assert_equal_contents(contents(whole), before)
        for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
            assert twin.memory.nbytes == whole.memory.nbytes  # with what levels share
            assert_equal_contents(contents(twin), before)
            assert torch.equal(twin.logits(PROBE), whole.logits(PROBE))


@pytest.mark.parametrize(
    ("form", "numbers"), [("full", 6 * 384), ("rank", 6 * 3 * 40), ("fixed", 2 * 3 * (24 + 24 + 16))]
)
def test_budget_is_what_is_held(form, numbers, tmp_path):
    """An average of a level with one fixed factor costs the other one: of rank 3, in 16, out 24."""
    levels = Level(4, 0.3, **FORMS[form]), Level(8, average_of=0, rate=0.5)
    both, one = learner_on(*levels), learner_on(levels[0])
    for learner in (both, one):
        learner.observe(random_ids(8))
        assert learner.memory.nbytes == learner.info().deltas
    average = both.memory.nbytes - one.memory.nbytes
    assert average == numbers * 8
    both.memory.save(tmp_path / "both")
    one.memory.save(tmp_path / "one")
    sizes = [(tmp_path / name).stat().st_size for name in ("both", "one")]
    assert average < sizes[0] - sizes[1] < average + 3000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({name: v[:2].clone() for name, v in t.items() if "/0/drawn/" in name}), "shape"),
        (lambda t: [t.pop(name) for name in list(t) if "/0/drawn/" in name], "one of the two factors"),
        (lambda t: t.update({"0/1/drawn/x": torch.ones(1)}), "unexpected tensors 0/1/drawn/x"),
        (lambda t: t.update({"0/1/rule/momentum/x": torch.ones(1)}), "unexpected tensors"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    levels = Level(4, 0.3, rank=3, learn_down=False), Level(8, average_of=0, rate=0.5)
    learner, other = learner_on(*levels), learner_on(*levels)
    learner.observe(random_ids(9))
    learner.memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors, _: change(tensors))
    with pytest.raises(ValueError, match=message):
        other.memory.load(tmp_path / "m")
    assert other.memory.is_empty


def test_a_fixed_factor_stays_and_the_other_is_learned_by_its_gradient():
    learner = learner_on(Level(6, 0.5, rank=2, clip=None, learn_down=False, rule="momentum"))
    both = learner_on(Level(6, 0.5, rank=2, clip=None, rule="momentum"))
    for each in (learner, both):
        each.observe(random_ids(6))
    state, other = (each.memory.rows[0].levels[0] for each in (learner, both))
    drawn = {slot: down.clone() for slot, down in state.drawn.items()}
    assert all(torch.equal(down, other.deltas[slot]) for slot, down in drawn.items())  # no gradient at up = 0
    assert all(torch.equal(up, other.deltas[slot]) for slot, up in state.deltas.items())
    assert set(state.rule) == set(state.deltas) == {slot for slot in other.deltas if slot.endswith(":up")}
    learner.observe(random_ids(6, seed=1))
    assert all(torch.equal(down, drawn[slot]) for slot, down in state.drawn.items())


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"average_of": 0}, "expected a rate too"),
            ({"rate": 0.1, "lr": 0.1}, "nothing to average"),
            ({"average_of": 0, "rate": 0.0}, "rate must be a finite number > 0 and <= 1, got 0.0"),
            ({"average_of": 0, "rate": 1.5}, "rate must be"),
            ({"average_of": -1, "rate": 0.5}, "average_of must be a finite whole number >= 0, got -1"),
            ({"average_of": True, "rate": 0.5}, "average_of must be"),
            ({"average_of": 0, "rate": 0.5, "lr": 0.1}, "lr is 0.1, but a level with average_of"),
            ({"average_of": 0, "rate": 0.5, "consolidate": 0.1}, "consolidate is 0.1"),
            ({"average_of": 0, "rate": 0.5, "decay": 0.1}, "decay is 0.1"),
            ({"average_of": 0, "rate": 0.5, "rule": "adam"}, "rule is 'adam'"),
            ({"average_of": 0, "rate": 0.5, "clip": None}, "clip is None"),
            ({"average_of": 0, "rate": 0.5, "rank": 2, "learn_down": False}, "learn_down is False"),
            ({"lr": 0.1, "learn_down": False}, "give the level a rank"),
            ({}, "lr is missing"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Level(8, **options)

    @pytest.mark.parametrize(
        ("levels", "message"),
        [
            ([Level(4, average_of=0, rate=0.1)], "from 0 to -1"),
            ([Level(4, 0.1), Level(8, average_of=1, rate=0.1)], "average_of=1; expected .* from 0 to 0"),
            ([Level(4, 0.1), Level(8, average_of=2, rate=0.1), Level(16, 0.1)], "of a faster level"),
            (
                [Level(4, 0.1), Level(8, average_of=0, rate=0.1), Level(16, average_of=1, rate=0.1)],
                "is an average itself.*Did you mean average_of=0",
            ),
            ([Level(4, 0.1), Level(6, average_of=0, rate=0.1)], "a multiple of that one's chunk of 4"),
            ([Level(4, 0.1), Level(8, average_of=0, rate=0.1, rank=2)], "leave the rank out"),
            (
                [Level(4, 0.1, layers=[0]), Level(8, average_of=0, rate=0.1, layers=[1])],
                "no weight in common",
            ),
        ],
    )
    def test_together(self, levels, message):
        with pytest.raises(ValueError, match=message):
            learner_on(*levels)


def test_description():
    """Settings that a level does not use are not in it: files from before there were any still fit."""
    assert Level(4, 0.1).describe().keys() == Level(8, 0.1, rank=2).describe().keys()
    averaged = averaging("fixed").levels
    assert averaged[1].describe()["rank"] == 3
    assert [Level(**level.describe()) for level in averaged] == list(averaged)
    system = nested_system(averaging("fixed"))
    component = system["Δ4 (chunk 32)"]
    assert component.rule == "A ← A + 0.5 (Δ1 − A); not in force while text is read, answers for Δ1; rank 3"
    assert component.objective == "½‖A − Δ1‖²"
    assert component.state_bytes == 2 * 3 * (24 + 24 + 16) * 8
    for transfer in system.transfers:
        if transfer.kind == "conditioning on weights":
            assert {*transfer.sources, *transfer.targets} <= {"Δ1 (chunk 4)", "Δ3 (chunk 16)"}


def test_flags():
    parser = new_parser("chat", "", "")
    add_level_flags(parser, chunk_sizes=(32, 128), level_lr=0.1)
    argv = "--chunk_sizes 4 8 16 --rule adam --rank 3 --learn_down false --average_of -1 0 -1 --rate 0 .5 0"
    expected = (
        Level(4, 0.1, rule="adam", rank=3, learn_down=False),
        Level(8, average_of=0, rate=0.5, rank=3),
        Level(16, 0.1, rule="adam", rank=3, learn_down=False),
    )
    assert levels_of(parse(parser, argv.split())) == expected
    for wrong, message in (
        ("--average_of -1 0", "expected a rate"),
        ("--average_of -1 0 --rate 0 .5 --level_lr .1 .2", "lr is 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            levels_of(parse(parser, wrong.split()))
