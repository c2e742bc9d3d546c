"""What a learner takes and gives: text, ids, batches, generation, the memory budget."""

from __future__ import annotations

import copy

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import CONFIGS, byte_llama, random_ids, tiny_model


@pytest.fixture(scope="module")
def text_model():
    return byte_llama(pad_token_id=byte_tokenizer().pad_token_id)


def learner_on(text_model, *levels):
    return stack_levels(*text_model, levels=levels or [Level(8, 0.3), Level(32, 0.1)])


class TestInputs:
    def test_text_is_its_ids(self, text_model):
        text, ids = learner_on(text_model), learner_on(text_model)
        given = "A memory is what remains."
        encoded = text_model[1](given, add_special_tokens=False)["input_ids"]
        for form in (encoded, torch.tensor(encoded), torch.tensor(encoded, dtype=torch.int32)):
            ids.memory.reset()
            ids.observe(form)
        text.observe(given)
        for name, delta in text.memory.diff().items():
            assert torch.equal(delta, ids.memory.diff()[name])
        assert text.perplexity(given) == ids.perplexity(encoded)

    def test_shapes(self, text_model):
        matrix = learner_on(text_model).observe(random_ids(3, 11))
        assert matrix.shape == (3, 11)
        assert torch.equal(matrix.isfinite(), torch.arange(11).expand(3, -1) > 0)
        texts = learner_on(text_model).observe(["one", "three"])
        assert [len(t) for t in texts] == [3, 5]
        assert learner_on(text_model).observe(random_ids(1, 5)).shape == (1, 5)
        assert len(learner_on(text_model).perplexity(["one", "three"])) == 2

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("", "no tokens"),
            ([], "expected a text"),
            (torch.empty(0, dtype=torch.long), "without tokens"),
            (torch.tensor([1.0]), "whole numbers"),
            ([1, 100_000], "from 0 to"),
            ([-1, 3], "from 0 to"),
            (torch.zeros(1, 2, 3, dtype=torch.long), "must be"),
            (None, "expected a text"),
        ],
    )
    def test_refused(self, text_model, given, message):
        learner = learner_on(text_model)
        with pytest.raises(ValueError, match=message):
            learner.observe(given)
        assert learner.memory.is_empty

    def test_text_needs_a_tokenizer(self, text_model):
        learner = stack_levels(text_model[0], levels=[Level(8, 0.1)])
        learner.observe([1, 2, 3])
        with pytest.raises(ValueError, match="no tokenizer"):
            learner.observe("text")

    def test_perplexity_of_a_single_token(self, text_model):
        with pytest.raises(ValueError, match="at least two tokens"):
            learner_on(text_model).perplexity("a")


class TestRows:
    def test_their_number_is_fixed_by_the_first_text(self, text_model):
        learner = learner_on(text_model)
        learner.observe(random_ids(2, 9))
        with pytest.raises(ValueError, match=r"got 3 row\(s\), but this memory has 2"):
            learner.observe(random_ids(3, 9))
        with pytest.raises(ValueError, match="name a `row`"):
            learner.observe(random_ids(9))
        learner.observe(random_ids(9), row=1)
        assert [row.position for row in learner.memory.rows] == [9, 18]
        with pytest.raises(ValueError, match="row must be from 0 to 1"):
            learner.observe(random_ids(9), row=2)
        for use in (learner.memory.diff, lambda row: learner.logits(random_ids(1, 9), row=row)):
            with pytest.raises(ValueError, match="row must be from 0 to 1"):
                use(row=-1)

    def test_each_is_scored_by_its_own_memory(self, text_model):
        learner = learner_on(text_model)
        ids = random_ids(2, 33)
        learner.observe(ids)
        both = learner.perplexity(ids)
        for i in (0, 1):
            alone = learner_on(text_model)
            alone.observe(ids[i])
            assert both[i] == learner.perplexity(ids[i], row=i) == alone.perplexity(ids[i])
        assert learner.perplexity(ids[0], row=1) > both[0]


class TestGenerate:
    def test_uses_what_was_learned_and_learns_nothing(self, text_model):
        learner = learner_on(text_model, Level(16, 1.0))
        plain = learner.generate("abc", max_new_tokens=8, do_sample=False)
        for _ in range(12):
            learner.observe("abcdefghabcdefgh")
        position = learner.memory.rows[0].position
        assert learner.generate("abc", max_new_tokens=5, do_sample=False) == "defgh" != plain[:5]
        assert learner.memory.rows[0].position == position

    def test_learns_when_asked(self, text_model):
        learner, other = learner_on(text_model), learner_on(text_model)
        text = learner.generate("abcdefgh", learn=True, max_new_tokens=8, do_sample=False)
        ids = text_model[1]("abcdefgh", add_special_tokens=False)["input_ids"]
        other.observe(torch.tensor(ids))
        assert learner.memory.rows[0].position == 16
        other.memory.reset()
        other.observe(other.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False))
        assert isinstance(text, str)
        for name, delta in learner.memory.diff().items():
            assert torch.equal(delta, other.memory.diff()[name])

    def test_ids(self, text_model):
        learner = learner_on(text_model)
        ids = random_ids(2, 5)
        out = learner.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 9)
        assert torch.equal(learner.generate(ids[0], max_new_tokens=4, do_sample=False), out[0])
        expected = text_model[0].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        assert torch.equal(out, expected)
        with pytest.raises(ValueError, match="one sequence"):
            learner.generate(ids, learn=True)
        with pytest.raises(ValueError, match="one text"):
            learner.generate(["a", "b"])


@pytest.mark.parametrize("family", CONFIGS)
def test_learning_lowers_the_loss_of_what_was_read(family):
    learner = stack_levels(tiny_model(family, dtype=torch.float32), levels=[Level(8, 0.3), Level(16, 0.3)])
    ids = random_ids(48)
    before = learner.perplexity(ids)
    for _ in range(5):
        learner.observe(ids)
    assert learner.perplexity(ids) < 0.7 * before


class TestSomeLevels:
    def test_are_in_force_alone(self):
        """What the model computes is W_base + Σ Δ over the chosen levels, whatever was asked before."""
        model, ids = tiny_model(), random_ids(2, 9, seed=3)
        learner = stack_levels(model, levels=[Level(4, 0.3), Level(8, 0.2), Level(16, 0.1, rank=2)])
        learner.observe(random_ids(40))
        found = {levels: learner.logits(ids, levels=levels) for levels in ((0,), (1, 2), (), None, (0,))}
        for levels, logits in found.items():
            copied = copy.deepcopy(model)
            for level in range(3) if levels is None else levels:
                for name, delta in learner.memory.diff(level).items():
                    copied.get_parameter(name).data += delta
            torch.testing.assert_close(logits, copied(ids).logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(found[()], model(ids).logits)
        expected = torch.nn.functional.cross_entropy(found[(0,)][0, :-1], ids[0, 1:])
        torch.testing.assert_close(learner.score(ids[0], levels=[0])[1:].mean(), expected)
        assert learner.perplexity(ids[0], levels=[0]) != learner.perplexity(ids[0])
        assert torch.equal(
            learner.generate(ids[0], levels=[], max_new_tokens=2),
            model.generate(ids[:1], max_new_tokens=2)[0],
        )

    def test_an_average_by_consolidation(self):
        """A slow level that only takes over is the moving average of what all levels together were."""
        learner = stack_levels(tiny_model(), levels=[Level(4, 0.3), Level(8, 0.0, consolidate=0.25)])
        average = {}
        for chunk in random_ids(48).split(8):
            learner.observe(chunk)
            for name, total in learner.memory.diff().items():
                average[name] = 0.75 * average.get(name, 0) + 0.25 * total
            for name, delta in learner.memory.diff(level=1).items():
                torch.testing.assert_close(delta, average[name])

    @pytest.mark.parametrize("levels", [[2], [-1], 0, ["fast"]])
    def test_that_are_not_there(self, levels):
        learner = stack_levels(tiny_model(), levels=[Level(4, 0.3), Level(8, 0.2)])
        with pytest.raises(ValueError, match=r"indices from 0 .the fastest. to 1, got"):
            learner.logits(random_ids(1, 3), levels=levels)


def test_the_budget_counts_what_is_held():
    model = tiny_model(dtype=torch.bfloat16)
    levels = [Level(8, 0.1), Level(16, 0.1, layers=[1], rule="adam"), Level(32, 0.1, rank=2)]
    learner = stack_levels(model, levels=levels)
    budget = learner.info()
    assert budget.parameters == sum(p.numel() for p in model.parameters())
    assert budget.base == 2 * budget.parameters
    mlps = 3 * 16 * 24
    assert budget.learned_parameters == 2 * mlps
    assert budget.deltas == 4 * (2 * mlps + mlps + 2 * 3 * 2 * (16 + 24))
    assert budget.activations > 0
    learner.observe(random_ids(40))
    held = learner.memory.rows[0]
    assert sum(t.nbytes for state in held.levels for t in state.deltas.values()) == budget.deltas
    assert learner.memory.nbytes <= budget.deltas + budget.sums + budget.rules + 1000
    assert learner.reader.workspace.nbytes == budget.effective_weights
    full_window = held.context.nbytes / len(held.context) * learner.reader.plan.window
    assert full_window == budget.context
    two = stack_levels(model, levels=levels)
    two.observe(random_ids(2, 4))
    assert two.info().total - budget.total == budget.deltas + budget.sums + budget.rules + budget.context
