"""Inputs from 1e-25 to 1e15: outputs and gradients stay finite, in every row and both of a norm's regimes.

Memories that learn from keys and values as they come (`unit` without them, mode="literal") are left out:
there a power of the input stands in the equation, and what it asks for is not in float32.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from nested_learning.layers import (
    ComposedMemory,
    ContinuumMemorySystem,
    LowRankSelfModifyingMLP,
    SelfModifyingLinear,
)
from nested_learning.layers.cms.level import CMSLevel
from nested_learning.layers.cms.writer import LevelWriter
from nested_learning.layers.registry import MIXERS, build_mixer

SCALES = (-25, -12, 0, 8, 15)
PARTS = [
    {"objective": "lp"},
    {"objective": "huber"},
    {"form": "lq"},
    {"form": "kl", "read": "chunk"},
    {"architecture": "swiglu"},
    {"architecture": "matrix", "rule": "dgd_literal"},
    {"momentum": True},
]


def mixer(name):
    known = inspect.signature(MIXERS[name]).parameters
    return build_mixer(name, 8, 2, {option: 4 for option in ("chunk_size", "window") if option in known})


def system(rule, variant):
    levels = [{"chunk_size": 2, "rule": rule}, {"chunk_size": 4, "rule": rule}]
    return ContinuumMemorySystem(8, levels=levels, variant=variant, update="regression")


LAYERS = {
    **{name: lambda name=name: mixer(name) for name in sorted(set(MIXERS) - {"memory"})},
    **{
        "-".join(map(str, parts.values())): lambda parts=parts: ComposedMemory(
            8, 2, parts={"chunk_size": 4, **parts}
        )
        for parts in PARTS
    },
    "linear": lambda: SelfModifyingLinear(8, 8),
    "low-rank": lambda: LowRankSelfModifyingMLP(8),
    **{f"cms-{rule}": lambda rule=rule: system(rule, "sequential") for rule in ("gd", "dgd", "adam")},
    "cms-nested": lambda: system("adagrad", "nested"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_finite(name, dtype):
    for k in SCALES:
        torch.manual_seed(0)
        layer = LAYERS[name]().to(dtype)
        g = torch.Generator().manual_seed(1)
        x = (10.0**k * torch.randn(2, 9, 8, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        y = layer(x)[0]
        (y * torch.randn(y.shape, generator=g).to(y.dtype)).sum().backward()
        assert y.isfinite().all(), k
        assert x.grad.isfinite().all(), k
        for parameter, p in layer.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), (k, parameter)


SIZES = itertools.product([1e-25, 0.3, 1.0, 1e15, 1e25, 1e60], [1e-30, 1e-20, 1.0, 1e18, 1e25])


@pytest.mark.parametrize(("clip", "scale"), [(c, s) for c, s in SIZES if c / s > 1e-36])
def test_a_write_is_clipped_to_a_norm_of_any_size(clip, scale):
    """W − η g min(1, clip / ‖g‖), whose squares need not be in float32: clip 1e25 clipped everything to 0."""
    sums = {
        name: scale * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("up.weight", "down.weight"))
    }
    weights = {name: torch.zeros(2, 3, 4) for name in sums}
    writer = LevelWriter(CMSLevel(chunk_size=2, lr=0.5, clip=clip))
    written, _ = writer.write(weights, weights, sums, {}, True)
    norm = sum(g.double().square().sum((1, 2)) for g in sums.values()).sqrt()
    for name, g in sums.items():
        factor = (clip / norm).clamp(max=1)[:, None, None]
        torch.testing.assert_close(written[name].double(), -0.5 * g.double() * factor, rtol=1e-5, atol=0)
