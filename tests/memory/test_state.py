from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from nested_learning.layers import SelfModifyingTitans
from nested_learning.memory.running import MemoryState


@pytest.fixture
def state() -> MemoryState:
    torch.manual_seed(0)
    layer = SelfModifyingTitans(8, 2, chunk_size=4, momentum=True)
    return layer(torch.randn(3, 6, 8))[1]


def test_a_state_survives_the_flat_form(state):
    again = MemoryState.from_tensors(state.to_tensors())
    for a, b in zip(state.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)
    assert set(state.to_tensors()) == {
        *(f"{f}.{m}" for f in ("anchor", "current", "momentum") for m in ("W1", "W2")),
        "position",
        "conv_tail",
    }


def test_absent_fields_stay_absent(state):
    bare = dataclasses.replace(state, momentum=None, conv_tail=None)
    again = MemoryState.from_tensors(bare.to_tensors())
    assert again.momentum is None
    assert again.conv_tail is None


def test_unknown_fields_are_refused(state):
    flat = {**state.to_tensors(), "anchors.W1": torch.zeros(3)}
    with pytest.raises(ValueError, match="no field 'anchors'"):
        MemoryState.from_tensors(flat)


def test_rows_move_together(state):
    picked = state.select_rows(torch.tensor([2, 0]))
    doubled = state.repeat_rows(2)
    for whole, two, six in zip(state.tensors(), picked.tensors(), doubled.tensors(), strict=True):
        assert torch.equal(two, whole[[2, 0]])
        assert torch.equal(six, whole[[0, 0, 1, 1, 2, 2]])


def test_detach_cuts_every_tensor_and_changes_none(state):
    assert state.current["W1"].requires_grad
    cut = state.detach()
    assert not any(t.requires_grad for t in cut.tensors())
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), cut.tensors(), strict=True))


def test_a_state_is_a_pytree(state):
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == len(state.tensors()) == 8
    assert isinstance(pytree.tree_unflatten(leaves, spec), MemoryState)
    assert state.nbytes() == sum(t.numel() * t.element_size() for t in leaves)


def test_shared_memory_counts_once_on_any_device(state):
    shared = dataclasses.replace(state, anchor=state.current)
    current = sum(t.numel() * t.element_size() for t in state.current.values())
    assert shared.nbytes() == state.nbytes() - current
    assert shared.map(lambda t: t.to("meta")).nbytes() == state.nbytes()  # the copies share nothing
