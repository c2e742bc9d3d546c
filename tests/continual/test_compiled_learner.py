"""A base model through torch.compile while it learns and answers: few graphs, and the plain one's results."""

from __future__ import annotations

import pytest
import torch

from nested_learning.continual import Level, compiled_calls, stack_levels
from tests.continual.tiny_models import random_ids, tiny_model

LEVELS = [Level(4, 0.05, rank=2), Level(8, 0.02), Level(16, average_of=0, rate=0.5)]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.slow
def test_windows_and_answers_without_compiling_again():
    plain = stack_levels(tiny_model(layers=1), levels=LEVELS, window=24)
    backend = Counting()
    learner = stack_levels(tiny_model(layers=1), levels=LEVELS, window=24, compile={"backend": backend})
    seen = []
    for seed in range(6):
        ids = random_ids(23, seed=seed)
        torch.testing.assert_close(learner.observe(ids), plain.observe(ids), equal_nan=True)
        prompt = ids[: 5 + seed]
        assert torch.equal(learner.generate(prompt, **GREEDY), plain.generate(prompt, **GREEDY))
        seen.append(backend.graphs)
    for name, delta in plain.memory.diff().items():
        torch.testing.assert_close(learner.memory.diff()[name], delta)
    # a turn may yet be the first that reads a single token, or ends where a window does
    assert 0 < seen[-1] <= seen[2] + 2 <= 24, f"compiled again at later windows: {seen}"
    # outside of deltas the base model is as it was
    assert learner.model._compiled_call_impl is None
    assert not any("factors" in name for module in learner.model.modules() for name in vars(module))


def test_a_compiler_that_fails_is_left():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    learner = stack_levels(tiny_model(layers=1), levels=LEVELS, compile={"backend": broken})
    ids = random_ids(9)
    with pytest.warns(RuntimeWarning, match="of the base model failed"):
        found = learner.observe(ids)
    expected = stack_levels(tiny_model(layers=1), levels=LEVELS).observe(ids)
    assert torch.equal(found[1:], expected[1:])


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing wraps"):
        stack_levels(tiny_model(), levels=LEVELS, gradient_checkpointing=True, compile=True)
    from tests.continual.architectures import tiny

    with pytest.raises(ValueError, match="stack of experts"):
        stack_levels(tiny("mixtral"), levels=LEVELS[:2], compile=True)


def test_the_default_is_torchs(monkeypatch):
    backend = Counting()
    monkeypatch.setattr(compiled_calls, "BACKEND", backend)
    learner = stack_levels(tiny_model(layers=1), levels=LEVELS[:1], compile=True)
    found = learner.observe(random_ids(5))
    expected = stack_levels(tiny_model(layers=1), levels=LEVELS[:1]).observe(random_ids(5))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert backend.graphs
