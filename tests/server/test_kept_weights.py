"""Ready-made weights of several users: switching makes no sum anew, and gives the same numbers."""

from __future__ import annotations

import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.weights import Workspace
from tests.continual.tiny_models import random_ids, tiny_model


def users(model, count: int):
    """Learners on one model, each with weights of its own."""
    learners = [stack_levels(model, levels=[Level(4, 0.5)]) for _ in range(count)]
    for seed, learner in enumerate(learners):
        learner.observe(random_ids(9, seed=seed))
    return learners


def weights_of(learner) -> torch.Tensor:
    """The effective weight of one map, as it stands in the model."""
    with learner.active() as model:
        return model.model.layers[0].mlp.up_proj._parameters["weight"]


def test_weights_of_the_users_of_now_stay():
    model = tiny_model()
    learners = users(model, 3)
    ids = random_ids(1, 6)
    expected = [learner.logits(ids) for learner in learners]
    workspace = Workspace.of(model)
    workspace.keep = 2
    first, second = weights_of(learners[0]).data_ptr(), weights_of(learners[1]).data_ptr()
    assert first != second
    for _ in range(3):  # to and fro between two users
        assert weights_of(learners[0]).data_ptr() == first
        assert weights_of(learners[1]).data_ptr() == second
    assert weights_of(learners[2]).data_ptr() == first  # the set that was not used for longest
    for _ in range(2):
        for learner, logits in zip(learners, expected, strict=True):
            assert torch.equal(learner.logits(ids), logits)
    one = sum(t.nbytes for t in workspace._free[0].weights.values())
    assert workspace.nbytes == 2 * one
    workspace.keep = 1
    for learner, logits in zip(learners, expected, strict=True):
        assert torch.equal(learner.logits(ids), logits)
    assert workspace.nbytes == one


def test_a_user_who_has_learned_has_new_weights():
    model = tiny_model()
    Workspace.of(model).keep = 3
    learner, other = users(model, 2)
    ids = random_ids(1, 6)
    before = learner.logits(ids)
    with other.active():
        learner.observe(random_ids(8, seed=7))  # a scope in a scope
    after = learner.logits(ids)
    assert not torch.equal(before, after)
    Workspace.of(model).keep = 1
    other.logits(ids)
    assert torch.equal(learner.logits(ids), after)
