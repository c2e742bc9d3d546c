"""Single tokens against whole sequences: every memory, any place in a chunk, padding, read modes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_learning.layers import MIXERS
from nested_learning.layers.memory import MemoryLayer
from nested_learning.memory import running

TOLERANCE = 1e-12  # relative to the largest entry of a tensor
ROWS = sorted(n for n, kind in MIXERS.items() if issubclass(kind, MemoryLayer) and n != "memory")
# Forms of a row that take another way through one token.
FORMS = [
    *((name, {}) for name in ROWS),
    ("titans", {"momentum": False}),
    ("titans", {"rule": "dgd", "momentum_scaled": False}),
    ("titans", {"read": "chunk", "conv_size": 0}),
    ("self_modifying_titans", {"adaptive_q": True, "expansion": 2.0}),
    ("self_modifying_titans", {"momentum": True}),
    ("self_modifying_titans", {"projection_chunk_size": 2}),
    ("self_modifying_titans", {"eta_max": 2.0, "projection_eta_max": 0.2}),
    ("gated_deltanet", {"eta_max": 2.0}),
    ("self_modifying_titans", {"rule": "dgd_literal", "conv_size": 2}),
    ("ttt_linear", {"read": "chunk"}),
    ("yaad", {"momentum": True, "norm": "hidden"}),
]
WIDTH, CHUNK = 8, 4


def build(name: str, options: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = MIXERS[name](WIDTH, 2, **{"chunk_size": CHUNK, **options}).double()
    with torch.no_grad():  # larger gates than at the start of training: every term counts
        for gate in layer.gates.values():
            gate.weight.normal_()
        for W in layer.initial.parameters():
            W.add_(0.1 * torch.randn_like(W))
    return layer


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got, exact = actual[name].detach().double(), wanted.detach().double()  # also of counts
        assert got.shape == exact.shape
        if exact.numel():
            assert (got - exact).abs().max() <= TOLERANCE * max(float(exact.abs().max()), 1e-3), name


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    before=st.integers(1, 2 * CHUNK),
    tokens=st.integers(1, CHUNK + 1),
    padded=st.booleans(),
    gradients=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_whole_sequence(name, options, rows, before, tokens, padded, gradients, seed):
    layer = build(name, options)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, before + tokens, WIDTH, dtype=torch.float64, generator=generator)
    real = torch.rand(rows, before + tokens, generator=generator) < 0.7 if padded else None

    def read(piece: slice, state):
        mask = None if real is None else real[:, piece]
        return layer(x[:, piece], state, mask, return_surprise=True)

    with torch.set_grad_enabled(gradients):
        y, state, surprise = read(slice(None), None)
        expected = {"y": y[:, before:], "surprise": surprise[:, before:], **state.to_tensors()}
        _, state, _ = read(slice(0, before), None)
        outputs = []
        for t in range(before, before + tokens):
            given = {n: v.clone() for n, v in state.to_tensors().items()}
            y, after, surprise = read(slice(t, t + 1), state)
            assert all(torch.equal(v, given[n]) for n, v in state.to_tensors().items())  # a value
            outputs.append((y, surprise))
            state = after
    y, surprise = (torch.cat(part, 1) for part in zip(*outputs, strict=True))
    assert_same({"y": y, "surprise": surprise, **state.to_tensors()}, expected)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_boundaries_are_the_same_where_the_host_cannot_see_the_places(padded, monkeypatch):
    """As on a GPU: by a choice per row on the device."""
    layer, x = build("self_modifying_titans", {}), torch.randn(3, 12, WIDTH, dtype=torch.float64)
    real = torch.rand(3, 12) < 0.7 if padded else None

    def stream() -> dict[str, Tensor]:
        state, found = None, {}
        for t in range(12):
            mask = None if real is None else real[:, t : t + 1]
            y, state = layer(x[:, t : t + 1], state, mask)
            found |= {f"{t} {n}": v for n, v in {"y": y, **state.to_tensors()}.items()}
        return found

    seen = stream()
    monkeypatch.setattr(running, "has_values", lambda _: False)
    assert all(torch.equal(v, seen[n]) for n, v in stream().items())
