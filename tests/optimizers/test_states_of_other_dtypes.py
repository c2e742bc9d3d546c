"""A state that was saved at another precision goes on at the parameters' own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nested_learning.optimizers import MultiFrequency
from tests.optimizers.cases import CASES

BUILDS = {
    **CASES,
    "adamw, every second": lambda params: MultiFrequency(
        params, lambda groups: torch.optim.AdamW(groups, lr=0.05), period=2
    ),
    "nadam, every second": lambda params: MultiFrequency(
        params, lambda groups: torch.optim.NAdam(groups, lr=0.05), period=2
    ),
}


def parameters(like, dtype):
    return [nn.Parameter(p.detach().to(dtype)) for p in like]


def feed(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_a_run_goes_on_at_another_precision(name, saved, loaded):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (), (2, 3, 2)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    first = parameters(start, saved)
    options = {"ns_dtype": "float32"} if name.startswith(("orthogonal", "m3")) else {}
    optimizer = BUILDS[name](first, **options)
    feed(optimizer, first, range(3))
    second = parameters(first, loaded)
    other = BUILDS[name](second, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed(optimizer, first, range(3, 5))
    feed(other, second, range(3, 5))
    half = torch.bfloat16 in (saved, loaded)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(
            q.double(), p.double(), rtol=0, atol=0.05 if half else 1e-4, msg=lambda text: f"{name}: {text}"
        )
