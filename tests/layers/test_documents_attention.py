"""Attention over documents in a row: each as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_learning.layers.attention import Attention, SlidingWindowAttention
from nested_learning.layers.attention.persistent import PersistentWindowAttention
from nested_learning.layers.attention.softmax import AttentionState

D = 8
LAYERS = {
    "full": lambda: Attention(D, 2),
    "grouped": lambda: Attention(D, 2, num_kv_heads=1),
    "window": lambda: SlidingWindowAttention(D, 2, window=3),
    "convolved": lambda: Attention(D, 2, conv_size=4),
    "convolved window": lambda: SlidingWindowAttention(D, 2, window=3, conv_size=3),
    "persistent": lambda: PersistentWindowAttention(D, 2, window=4, persistent_tokens=2),
}


def build(name: str) -> Attention:
    torch.manual_seed(0)
    return LAYERS[name]().double()


def alone(
    layer: Attention, x: Tensor, position_ids: Tensor, real: Tensor, state: AttentionState | None
) -> tuple[Tensor, Tensor]:
    """Outputs with each document in a call of its own, and, with the states, those of one token more."""
    outputs, more = [], []
    for b in range(len(x)):
        own = None if state is None else state.slice_rows(slice(b, b + 1))
        columns = real[b].nonzero().squeeze(1).tolist()
        cuts = [i for i, c in enumerate(columns) if i == 0 or position_ids[b, c] == 0]
        y = torch.zeros_like(x[b])
        for start, stop in zip(cuts, [*cuts[1:], len(columns)][: len(cuts)], strict=True):
            at = columns[start:stop]
            before = None if position_ids[b, at[0]] == 0 else own
            out, own = layer(x[b : b + 1, at], before)
            y[at] = out[0]
        outputs.append(y)
        more.append(layer(x[b : b + 1, :1], own)[0])
    return torch.stack(outputs), torch.cat(more)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(LAYERS)), stateful=st.booleans(), padded=st.booleans())
def test_packed_is_alone(data: st.DataObject, name: str, stateful: bool, padded: bool) -> None:
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    flags = st.lists(st.booleans(), min_size=B * T, max_size=B * T)
    layer = build(name)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    real = torch.tensor(data.draw(flags)).view(B, T) if padded else torch.ones(B, T, dtype=torch.bool)
    begins = torch.tensor(data.draw(flags)).view(B, T)
    position_ids = torch.where(begins, 0, 1)
    x = torch.randn(B, T, D, dtype=torch.float64, generator=draw).requires_grad_()
    state = None
    if stateful:
        state = layer(torch.randn(B, 5, D, dtype=torch.float64, generator=draw))[1].detach()
        state.key.requires_grad_()
    wanted = alone(layer, x, position_ids, real, state)
    y, after = layer(x, state, real if padded else None, position_ids=position_ids)
    got = y, layer(x[:, :1], after)[0]
    leaves = [x, *layer.parameters(), *([] if state is None else [state.key])]
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=draw) for t in got]
    grads = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(both, weights, strict=True)),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for both in (got, wanted)
    ]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", list(LAYERS))
def test_another_document_changes_no_bit(name: str) -> None:
    layer = build(name).float()
    numbers = torch.tensor([[0] * 5 + [1] * 7])
    x = torch.randn(1, 12, D)
    results = []
    for content in (x[:, :5], torch.full_like(x[:, :5], float("nan"))):
        own = torch.cat([content, x[:, 5:]], 1).requires_grad_()
        y, state = layer(own, documents=numbers)
        (g,) = torch.autograd.grad(y[:, 5:].sum(), own)
        results.append((y[:, 5:], g[:, 5:], state.key, state.value, state.positions))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (state.positions.amax() + 1) == 7
