"""A padded token changes nothing, whatever it holds: NaN of a layer before counts for nothing either."""

from __future__ import annotations

import pytest
import torch

from nested_learning import HopeLayer
from nested_learning.layers import (
    Attention,
    ContinuumMemorySystem,
    GatedDeltaNet,
    LinearAttention,
    LowRankSelfModifyingMLP,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    SelfModifyingLinear,
    SelfModifyingTitans,
    SlidingWindowAttention,
    Titans,
)

D, T = 8, 11
LEVELS = [{"chunk_size": 2, "lr": 0.3}, {"chunk_size": 4, "rule": "adam"}]
LAYERS = {
    "linear attention": lambda: LinearAttention(D, 2, chunk_size=4),
    "gated deltanet": lambda: GatedDeltaNet(D, 2, chunk_size=4),
    "titans": lambda: Titans(D, 2, chunk_size=4),
    "self-modifying": lambda: SelfModifyingTitans(D, 2, chunk_size=4, conv_size=0),
    "attention": lambda: Attention(D, 2),
    "window": lambda: SlidingWindowAttention(D, 2, window=3),
    "convolved": lambda: Attention(D, 2, conv_size=4),
    "mag": lambda: MemoryAsGate(D, 2, window=4),
    "mal": lambda: MemoryAsLayer(D, 2, window=4),
    "mac": lambda: MemoryAsContext(D, 2, segment=4),
    "cms": lambda: ContinuumMemorySystem(D, LEVELS, update="regression"),
    "nested cms": lambda: ContinuumMemorySystem(
        D, [{"chunk_size": 2}, {"chunk_size": 4}], "nested", "regression", nested_gradient="exact"
    ),
    "independent cms": lambda: ContinuumMemorySystem(D, LEVELS, "independent", "regression"),
    "linear": lambda: SelfModifyingLinear(D, D, chunk_size=4),
    "low rank": lambda: LowRankSelfModifyingMLP(D, chunk_size=4),
    "hope": lambda: HopeLayer(D, 2, cms_levels=[{"chunk_size": 4}], cms_update="regression"),
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
fills = pytest.mark.parametrize("fill", [float("nan"), float("inf")])


def made(build, fill):
    """A layer, and tokens of which the padding holds zeros and, in a copy, `fill`."""
    torch.manual_seed(0)
    layer = build().double()
    real = torch.rand(4, T) > 0.4
    real[0, :3], real[1], real[2] = False, False, True  # padding in front, nothing but padding, none
    x = torch.randn(4, T, D, dtype=torch.float64).masked_fill(~real.unsqueeze(-1), 0)
    return layer, real, x, x.masked_fill(~real.unsqueeze(-1), fill)


@layers
@fills
def test_a_sequence_and_what_follows_it(build, fill):
    layer, real, x, filled = made(build, fill)
    results = []
    for tokens in (x, filled):
        y, state = layer(tokens, None, mask=real)
        after, _ = layer(x[:, :1], state)
        loss = y[real].square().sum() + after.square().sum()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        results.append([y[real], after, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@layers
@fills
def test_single_tokens(build, fill):
    layer, real, x, filled = made(build, fill)
    outputs = []
    for tokens in (x, filled):
        state, ys = None, []
        for t in range(T):
            y, state = layer(tokens[:, t : t + 1], state, mask=real[:, t : t + 1])
            ys.append(y)
        ys = torch.cat(ys, 1)
        outputs.append([ys[real], layer(x, state)[0]])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
