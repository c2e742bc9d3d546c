"""Reading the rows of a batch in groups: the same as at once."""

from __future__ import annotations

import inspect

import pytest
import torch

from nested_learning.layers.memory import layer as memory_layer
from nested_learning.layers.registry import MIXERS, build_mixer


def run(layer, x, mask, state=None):
    y, state, surprise = layer(x, state, mask, return_surprise=True)
    leaves = [x, *layer.parameters()]
    total = y.square().sum() + sum(t.square().sum() for t in state.tensors() if t.is_floating_point())
    slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
    return [y, surprise, *state.tensors(), *slopes], state


@pytest.mark.parametrize("name", ["self_modifying_titans", "titans", "gated_deltanet", "memora"])
@pytest.mark.parametrize("padded", [False, True])
def test_groups_change_nothing(name, padded, monkeypatch):
    torch.manual_seed(0)
    layer = build_mixer(name, 8, 2, {"chunk_size": 4}).double()
    x = torch.randn(5, 9, 8, dtype=torch.float64, requires_grad=True)
    more = torch.randn(5, 1, 8, dtype=torch.float64, requires_grad=True)
    mask = None
    if padded:
        mask = torch.ones(5, 9, dtype=torch.bool)
        mask[0, :2], mask[3, :5] = False, False
    whole, state = run(layer, x, mask)
    whole += run(layer, more, None, state)[0]
    calls = []
    read = layer._read_segment
    monkeypatch.setattr(
        layer, "_read_segment", lambda place, *args: calls.append(len(place.x)) or read(place, *args)
    )
    monkeypatch.setattr(memory_layer, "ROWS", 2 * 4 * 8)
    grouped, after = run(layer, x, mask)
    grouped += run(layer, more, None, after)[0]
    assert calls == [2, 2, 1, 5]  # one token is little work
    for a, b in zip(grouped, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert after.nbytes() == state.nbytes()  # what is held once stays so


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"memory"}))
def test_no_rows(name):
    known = inspect.signature(MIXERS[name]).parameters
    options = {option: 4 for option in ("chunk_size", "window") if option in known}
    layer = build_mixer(name, 8, 2, options)
    x = torch.zeros(0, 9, 8, requires_grad=True)
    y, state = layer(x)
    y.sum().backward()
    assert y.shape == (0, 9, 8)
    assert x.grad is not None
    assert all(len(t) == 0 for t in state.tensors())
    assert layer(torch.zeros(0, 1, 8), state)[0].shape == (0, 1, 8)
