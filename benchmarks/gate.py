"""Parity checks before the clock starts: no figure is that of a layer which computes something else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import slopes
from nested_learning.layers import MemoryLayer
from nested_learning.memory.objective import L2
from nested_learning.memory.system import RULE_NAMES, RuleName, learning_rule
from tests.oracles import memory_layer as oracle

TOLERANCE = 2e-3  # float32 against float64, relative to the largest entry of each tensor


class GateError(RuntimeError):
    """A layer differs from its reference; nothing is timed."""


def equals_oracle(layer: MemoryLayer, tokens: int) -> None:
    """The layer in its own dtype against the token-by-token oracle in float64: output and every gradient.

    Raises:
        GateError: naming the tensor that differs.
    """
    s = layer.system
    options = {
        "num_heads": layer.num_heads,
        "chunk_size": s.chunk_size,
        "eta_max": s.eta_max,
        "momentum": s.momentum,
        "momentum_scaled": s.momentum_scaled,
        "read": s.read,
        "conv_size": layer.conv_size,
    }
    run: Callable[..., tuple[Tensor, object, Tensor]] = oracle.titans
    if s.generated:
        run = oracle.self_modifying_titans
        options |= {"projection_chunk_size": s.projection_chunk_size, "decay": s.retention.decay}
        options["adaptive"] = "".join(path for path in "kvq" if path in s.generated)
    x = torch.randn(1, tokens, layer.hidden_size, device=layer.in_proj.weight.device, requires_grad=True)
    params = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = x.detach().double().requires_grad_()
    y = run(params, exact, rule=_rule_of(layer), **options)[0]
    leaves = [exact, *params.values()]
    expected = [y.detach(), *torch.autograd.grad(y.square().mean(), leaves, materialize_grads=True)]
    _compare(slopes(layer, x), expected, ["y", "x", *params])


def equals_itself_token_by_token(layer: nn.Module, width: int, tokens: int) -> None:
    """A mixer on a whole sequence against a float64 copy that is fed token by token: the output.

    Raises:
        GateError: naming the tensor that differs.
    """
    x = torch.randn(1, tokens, width)
    exact, state, pieces = copy.deepcopy(layer).double(), None, []
    with torch.no_grad():
        for token in x.double().split(1, dim=1):
            y, state = exact(token, state)
            pieces.append(y)
        _compare([layer(x)[0]], [torch.cat(pieces, dim=1)], ["y"])


def _rule_of(layer: MemoryLayer) -> RuleName:
    """The name by which the oracle knows the layer's rule, with the L2 objective that it has."""
    s = layer.system
    return next(name for name in RULE_NAMES if learning_rule(s.architecture, L2(), name) == s.rule)


def _compare(actual: list[Tensor], expected: list[Tensor], names: list[str]) -> None:
    for name, ours, reference in zip(names, actual, expected, strict=True):
        error = float((ours.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-12))
        if not error <= TOLERANCE:
            raise GateError(f"{name} differs from the reference by {error:.1e} of its largest entry")
