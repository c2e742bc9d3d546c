"""Layers of the chunk algebra, what they give with every gradient, and its comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.layers import SelfModifyingTitans

TOLERANCE = 1e-12


def build(
    hidden_size: int = 8,
    dtype: torch.dtype = torch.float64,
    kind: type[torch.nn.Module] = SelfModifyingTitans,
    **options: Any,
) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = kind(hidden_size, **{"num_heads": 2, "chunk_size": 4, **options}).to(dtype)
    with torch.no_grad():  # larger gates than at the start of training: every term counts
        for gate in layer.gates.values():
            gate.weight.normal_()
    return layer


def batch(layer: torch.nn.Module, rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, layer.hidden_size, dtype=dtype, generator=generator).requires_grad_()


def outputs(layer: torch.nn.Module, x: Tensor, **call: Any) -> dict[str, Tensor]:
    y, state = layer(x, **call)
    momentum = {f"momentum of {name} after": S for name, S in (state.momentum or {}).items()}
    return {"y": y, **{f"{name} after": W for name, W in state.current.items()}, **momentum}


def random_like(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed))


def results(layer: torch.nn.Module, x: Tensor, **call: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random projection of them to x and to every parameter."""
    out = outputs(layer, x, **call)
    leaves = {"x": x, **dict(layer.named_parameters())}
    total = sum((t * random_like(t, 2 + i)).sum() for i, t in enumerate(out.values()))
    slopes = torch.autograd.grad(total, list(leaves.values()))
    found = {**out, **{f"gradient of {name}": g for name, g in zip(leaves, slopes, strict=True)}}
    return {name: t.detach() for name, t in found.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Relative to the largest entry of each tensor."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape
        assert reference.abs().max() > 0, f"{name} is zero: nothing is compared"
        error = float((actual[name] - reference).detach().abs().max() / reference.abs().max())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
