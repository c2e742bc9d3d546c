"""Descriptions of torch.optim's optimizers as memories of gradients.

State bytes are what a parameter's state will be once it has had a gradient; a test compares each with the
state after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nested_learning.levels.registry import GradientMemory, Group, OptimizerRule, describes_optimizer

DOT = "−⟨m, g⟩"
ADAM_OBJECTIVE = "Σ‖m ⊙ gᵢ − √(Σg²)‖² + λ‖m‖² (eq 101-105)"
ADAM_STEP = "W ← W − lr·m̂/(√v̂ + ε)"
ADAGRAD_OBJECTIVE = "eq 106-111 with a diagonal H"


def like_bytes(
    params: Sequence[Tensor], copies: int, dtype: Callable[[Tensor], torch.dtype] | None = None
) -> int:
    """Bytes of `copies` tensors of each parameter's shape, in its dtype or the one that `dtype` gives."""
    return sum(copies * p.numel() * (p.dtype if dtype is None else dtype(p)).itemsize for p in params)


def _counters(params: Sequence[Tensor], fused: bool = False) -> int:
    """torch's step counts: a tensor per parameter, of the default dtype where that is float64."""
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return len(params) * (torch.float64 if wide else torch.float32).itemsize


@describes_optimizer(torch.optim.SGD)
def _sgd(optimizer: torch.optim.SGD, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    if group["momentum"] == 0:
        yield OptimizerRule(params=params, step="W ← W − lr·g")
        return
    memory = GradientMemory(
        name="momentum",
        keys=("momentum_buffer",),
        state_bytes=like_bytes(params, 1),
        objective=DOT,
        rule=f"m ← {group['momentum']:g} m + g (eq 33)",
    )
    yield OptimizerRule(params=params, step="W ← W − lr·m", memories=(memory,))


@describes_optimizer(torch.optim.Adam, torch.optim.AdamW)
def _adam(optimizer: torch.optim.Adam, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    memory = GradientMemory(
        name="moments",
        keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
        state_bytes=like_bytes(params, 3 if group["amsgrad"] else 2)
        + _counters(params, bool(group["fused"])),
        objective=ADAM_OBJECTIVE,
        rule=adam_rule(*group["betas"]),
    )
    yield OptimizerRule(params=params, step=ADAM_STEP, memories=(memory,))


def adam_rule(beta1: float, beta2: float) -> str:
    return f"averages of g and g², β = {float(beta1):g}, {float(beta2):g}"


@describes_optimizer(torch.optim.Adagrad)
def _adagrad(optimizer: torch.optim.Adagrad, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    memory = GradientMemory(
        name="sum of squares",
        keys=("sum", "step"),
        state_bytes=like_bytes(params, 1) + _counters(params, bool(group.get("fused"))),
        objective=ADAGRAD_OBJECTIVE,
        rule="H ← H + g²",
    )
    yield OptimizerRule(params=params, step="W ← W − lr·g/(√H + ε)", memories=(memory,))


@describes_optimizer(torch.optim.RMSprop)
def _rmsprop(optimizer: torch.optim.RMSprop, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    square = GradientMemory(
        name="square average",
        keys=("square_avg", "grad_avg", "step"),
        state_bytes=like_bytes(params, 2 if group["centered"] else 1) + _counters(params),
        objective="½‖v − g²‖²" + (", and ½‖m − g‖²" if group["centered"] else ""),
        rule=f"v ← {group['alpha']:g} v + {1 - group['alpha']:g} g²",
    )
    if group["momentum"] == 0:
        yield OptimizerRule(params=params, step="W ← W − lr·g/(√v + ε)", memories=(square,))
        return
    momentum = GradientMemory(
        name="momentum",
        keys=("momentum_buffer",),
        state_bytes=like_bytes(params, 1),
        objective=DOT,
        rule=f"m ← {group['momentum']:g} m + g/(√v + ε)",
        needs=("square average",),
    )
    yield OptimizerRule(params=params, step="W ← W − lr·m", memories=(square, momentum))


@describes_optimizer(torch.optim.Muon)
def _muon(optimizer: torch.optim.Muon, group: Group) -> Iterator[OptimizerRule]:
    params, mu = group["params"], group["momentum"]
    memory = GradientMemory(
        name="momentum",
        keys=("momentum_buffer",),
        state_bytes=like_bytes(params, 1),
        objective=DOT,
        rule=f"m ← {mu:g} m + {1 - mu:g} g",
    )
    yield OptimizerRule(params=params, step="W ← W − lr·NewtonSchulz(m) (eq 52)", memories=(memory,))
