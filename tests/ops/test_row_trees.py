"""States of several batches as that of one."""

from __future__ import annotations

import torch

from nested_learning.layers.attention.softmax import Attention, AttentionState
from nested_learning.memory.state import State
from nested_learning.ops.rows import join_rows, select_rows


def test_states_of_other_lengths_are_joined_with_padding_in_front() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    _, short = attention(x[:1, :2])
    _, long = attention(x[1:, :5])
    joined: AttentionState = State.join_rows([short, long])
    assert joined.positions.tolist() == [[-1, -1, -1, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    y, after = attention(x[:, 5:], joined)
    torch.testing.assert_close(y[:1], attention(x[:1, 5:], short)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1:], attention(x[1:, 5:], long)[0], rtol=0, atol=1e-12)
    assert after.positions[:, -1].tolist() == [2, 5, 5]


def test_what_fields_share_stays_shared() -> None:
    a, b = torch.randn(2, 3), torch.randn(1, 3)
    joined = join_rows([{"x": a, "y": a, "n": 4}, {"x": b, "y": b, "n": 4}])
    assert joined["x"] is joined["y"]
    assert torch.equal(joined["x"], torch.cat([a, b]))
    chosen = select_rows(joined, torch.tensor([2, 0]))
    assert chosen["x"] is chosen["y"]
    assert torch.equal(chosen["x"], torch.stack([b[0], a[0]]))
    assert select_rows(joined, slice(0, 3))["x"] is joined["x"]


def test_dictionaries_are_joined_by_their_keys() -> None:
    """A state from a file has its weights in the order of their names."""
    a, b = torch.randn(2, 2, 3), torch.randn(2, 3, 2)
    joined = join_rows([{"up": a[:1], "down": b[:1]}, {"down": b[1:], "up": a[1:]}])
    assert torch.equal(joined["up"], a)
    assert torch.equal(joined["down"], b)
