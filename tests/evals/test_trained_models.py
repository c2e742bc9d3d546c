"""Models of a task: equal parameters, chunks that act within a sequence, levels trained as the row says."""

import pytest
import torch

from nested_learning.evals.fit import Diverged, TaskBatch, Training, answers, fit
from nested_learning.evals.methods.models import MODELS, SLOW_PERIOD, Size, TrainedModel

SIZE = Size(vocab_size=11, longest=32, width=32)
BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.parametrize("width", [32, 64])
def test_parameters_are_those_of_the_transformer(width):
    size = Size(vocab_size=64, longest=128, width=width)
    counts = {model.name: model.new_model(size, 0).num_parameters() for model in MODELS}
    for name, count in counts.items():
        assert count == pytest.approx(counts["transformer"], rel=0.01), name


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_chunk_ends_twice_in_the_longest_sequence(model):
    config = model.config(SIZE)
    chunks = [level["chunk_size"] for level in config.cms_levels]
    chunks += [o["chunk_size"] for o in config.mixer_options.values() if "chunk_size" in o]
    assert max(chunks) * 2 <= SIZE.longest
    assert (len(config.cms_levels) == 2) == (model.levels != "one")
    assert (config.cms_update == "regression") == (model.levels == "in context")


def test_a_slow_level_steps_on_several_batches():
    model = BY_NAME["hope"].new_model(SIZE, 0)
    optimizer = BY_NAME["hope"].optimizer(model, 1e-2, 0.0)
    fast, slow = (model.get_parameter(f"model.layers.0.cms.blocks.{i}.up.weight") for i in (0, 1))
    before = fast.detach().clone(), slow.detach().clone()
    for step in range(1, SLOW_PERIOD + 1):
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(fast, before[0])
        assert torch.equal(slow, before[1]) == (step < SLOW_PERIOD)


def test_settings_of_the_mixer_reach_it():
    model = BY_NAME["titans"].at({"mixer.momentum": False, "lr": 1.0})
    assert model.config(SIZE).mixer_options["titans"]["momentum"] is False
    with pytest.raises(ValueError, match="momentun"):
        BY_NAME["titans"].at({"mixer.momentun": False}).config(SIZE)


def test_a_size_that_cannot_be_matched_is_refused():
    class Wide(TrainedModel):
        pass

    heavy = Wide("heavy", "titans", options={"expansion": 64.0})
    with pytest.raises(ValueError, match=r"expected .* within 1 %"):
        heavy.config(SIZE)


def batches(seed):
    """Sequences whose target is the id of the place before."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, 11, (16, 12), generator=generator)
        targets = ids.roll(1, 1)
        targets[:, 0] = -100
        yield TaskBatch(ids, targets)


def test_fit_learns_and_repeats():
    method = BY_NAME["transformer"]

    def train():
        model = method.new_model(SIZE, 0)
        losses = fit(method, model, batches(0), Training(steps=60, lr=1e-2))
        return model, losses

    (model, losses), (_, again) = train(), train()
    assert losses == again
    assert losses[-1] < 0.5 * losses[0]
    ids, targets = next(batches(1))
    right = (answers(model, ids) == targets)[:, 1:]
    assert right.float().mean() > 0.8


def test_a_run_that_diverges_says_so():
    method = BY_NAME["transformer"].at({"lr": 1e30})
    with pytest.raises(Diverged, match=r"step \d+ is .* at a learning rate of 1e\+30"):
        fit(method, method.new_model(SIZE, 0), batches(0), Training(steps=50, lr=1.0, warmup=0.0))


def test_the_callback_ends_a_training():
    method = BY_NAME["transformer"]
    training = Training(steps=50, lr=1e-3)
    losses = fit(method, method.new_model(SIZE, 0), batches(0), training, lambda step, loss: step == 3)
    assert len(losses) == 3
