"""The outer gradient of a base model whose levels learn as they read."""

from __future__ import annotations

import copy

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.adaptation import Adapter
from tests.continual.oracle import Oracle
from tests.continual.test_against_oracle import weights_of
from tests.continual.tiny_models import random_ids, tiny_model


class OuterOracle(Oracle):
    """Adds up the gradients of every loss at the weights it was read with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.outer = {}

    def _read(self, ids, targets, cache, weights=1.0):
        losses, grads = super()._read(ids, targets, cache, weights)
        for name, g in grads.items():
            self.outer[name] = self.outer.get(name, 0) + g
        return losses, grads


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_every_parameter(family, checkpointing):
    model = tiny_model(family)
    learner = stack_levels(
        model, levels=[Level(4, 0.3), Level(8, 0.2, layers=[1])], gradient_checkpointing=checkpointing
    )
    ids = random_ids(2, 16)
    loss = Adapter(learner).backward(ids)
    oracles = [
        OuterOracle(
            tiny_model(family),
            [(4, 0.3, weights_of(model, [0, 1]), 1.0, None), (8, 0.2, weights_of(model, [1]), 1.0, None)],
        )
        for _ in ids
    ]
    expected = torch.stack([oracle.observe(row)[1:].mean() for oracle, row in zip(oracles, ids, strict=True)])
    torch.testing.assert_close(loss, expected.mean())
    for name, parameter in model.named_parameters():
        total = sum(oracle.outer[name] for oracle in oracles) / (2 * 15)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-8, atol=1e-12)
    assert learner.memory.is_empty


def test_without_learning_it_is_the_ordinary_gradient():
    """One segment, learning rate 0, low-rank deltas beside full ones: plain training."""
    model = tiny_model()
    plain = copy.deepcopy(model)
    learner = stack_levels(model, levels=[Level(32, 0.0), Level(64, 0.0, rank=2)])
    ids = random_ids(3, 20)
    loss = Adapter(learner).backward(ids)
    expected = plain(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss.float(), expected.detach())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_frozen_parameters_stay_without_gradient():
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    Adapter(stack_levels(model, levels=[Level(4, 0.3)])).backward(random_ids(1, 9))
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


def test_the_loss_alone_leaves_no_gradient():
    model = tiny_model()
    adapter = Adapter(stack_levels(model, levels=[Level(4, 0.3)]))
    ids = random_ids(2, 18)
    torch.testing.assert_close(adapter.loss(ids), adapter.backward(ids))
    model.zero_grad()
    adapter.loss(ids)
    assert all(p.grad is None for p in model.parameters())
