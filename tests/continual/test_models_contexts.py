"""Contexts with recurrent states: gradients within a pass, pasts that nothing writes to, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.context import Context
from tests.continual.architectures import VOCAB, tiny

IDS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=["mamba", "qwen3_5_text"])
def learner(request):
    return stack_levels(tiny(request.param, torch.float64), levels=[Level(8, 0.1)])


def test_single_tokens_alone_where_the_model_asks_for_it(learner):
    assert learner.reader.contexts.stepwise == (learner.model.config.model_type == "mamba")


@pytest.mark.parametrize("count", [2, 7])
def test_gradients_after_a_state_are_those_of_finite_differences(learner, count):
    """The first pass of a segment has one token, whose state transformers' layers write in place."""
    reader, model = learner.reader, learner.model
    with torch.no_grad():
        _, context = reader.contexts.read(model, IDS[None, :8], Context())
    held = [{name: t.clone() for name, t in layer.items()} for layer in context.layers]
    tokens, learn = IDS[8 : 8 + count], torch.ones(count - 1, dtype=torch.bool)
    row = learner.memory.rows[0].unread()
    with reader.workspace.installed(reader.writers, row, learning=True) as leaves:
        _, after, grads = reader.read_pairs(tokens, learn, context, leaves)
    assert len(after) == len(context) + count - 1
    generator = torch.Generator().manual_seed(0)
    for target in learner.reader.writers[0].targets[-2:]:
        direction = torch.randn(target.weight.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                target.weight.add_(direction, alpha=step)
                losses.append(float(reader.losses(tokens, context)[0].sum()))
                target.weight.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]) / 2e-3
        assert float((grads[target.name] * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-4)
    for layer, before in zip(context.layers, held, strict=True):
        assert all(torch.equal(t, before[name]) for name, t in layer.items())


def test_a_state_cannot_be_cropped(learner):
    _, context = learner.reader.contexts.read(learner.model, IDS[None, :8], Context())
    assert len(context.crop(0)) == 0
    assert context.crop(8) is context
    with pytest.raises(ValueError, match="8 tokens with recurrent states cannot be cut to 5"):
        context.crop(5)


def test_a_file_holds_where_the_segment_began(learner, tmp_path):
    """Tokens of an unfinished segment are read once more from there; without it a file is refused."""
    path = tmp_path / "memory.safetensors"
    with learner.adaptation_scope():
        learner.observe(IDS[:12])
        row = learner.memory.rows[0]
        assert (len(row.context), len(row.resume)) == (11, 7)
        learner.memory.save(path)
        expected = learner.observe(IDS[12:])
        assert learner.memory.rows[0].resume is None
    assert any(name.startswith("0/resume/") for name in load_file(path))
    with learner.adaptation_scope():
        learner.memory.load(path)
        assert torch.equal(learner.observe(IDS[12:]), expected)


def test_checkpointing_reads_the_same_past_twice():
    model = tiny("qwen3_5_text")
    plain, checkpointed = (
        stack_levels(model, levels=[Level(8, 0.1)], gradient_checkpointing=which) for which in (False, True)
    )
    torch.testing.assert_close(plain.observe(IDS), checkpointed.observe(IDS), equal_nan=True)
    for name, delta in plain.memory.diff().items():
        torch.testing.assert_close(delta, checkpointed.memory.diff()[name])
