from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_learning.ops import causal_conv, row_layout


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mask=st.integers(1, 7).flatmap(
        lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=4)
    ),
    offsets=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_layout_against_a_loop(mask, offsets):
    mask = torch.tensor(mask)
    B, T = mask.shape
    offset = torch.tensor(offsets[:B])
    layout = row_layout(mask, offset, columns=5 + T)
    x = torch.arange(1, B * T + 1, dtype=torch.float64).view(B, T, 1)
    packed = layout.pack(x)
    for b in range(B):
        expected = torch.zeros(5 + T, dtype=torch.float64)
        real = [x[b, t, 0] for t in range(T) if mask[b, t]]
        for i, value in enumerate(real):
            expected[offsets[b] + i] = value
        assert torch.equal(packed[b, :, 0], expected)
        assert layout.end[b] == offsets[b] + len(real)
    assert torch.equal(layout.unpack(packed), x * mask.unsqueeze(-1))
    assert torch.equal(layout.real, packed[..., 0] != 0)


def test_conv_equals_conv1d():
    x = torch.randn(2, 3 + 5, 6, dtype=torch.float64)
    weight = torch.randn(6, 1, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x.mT, weight, groups=6).mT
    torch.testing.assert_close(causal_conv(x, weight), expected)
