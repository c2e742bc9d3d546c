"""Descriptions of torch.optim's optimizers as memories of gradients.

State bytes are what a parameter's state will be once it has had a gradient; a test compares each with the
state after a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nested_learning.levels.describe.registry import (
    DescribedGradientMemory,
    OptimizerRule,
    describes_optimizer,
)
from nested_learning.optimizers.arithmetic import Group

DOT = "−⟨m, g⟩"
ADAM_OBJECTIVE = "Σ‖m ⊙ gᵢ − √(Σg²)‖² + λ‖m‖² (eq 101-105)"
ADAM_STEP = "W ← W − lr·m̂/(√v̂ + ε)"
ADAGRAD_OBJECTIVE = "eq 106-111 with a diagonal H"


def like_bytes(
    params: Sequence[Tensor], copies: int, dtype: Callable[[Tensor], torch.dtype] | None = None
) -> int:
    """Bytes of `copies` tensors of each parameter's shape, in its dtype or the one that `dtype` gives."""
    return sum(copies * p.numel() * (p.dtype if dtype is None else dtype(p)).itemsize for p in params)


def _counter_bytes(params: Sequence[Tensor], fused: bool = False) -> int:
    """Bytes of torch's step counts: a tensor per parameter, of the default dtype where that is float64."""
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return len(params) * (torch.float64 if wide else torch.float32).itemsize


def momentum_of(
    params: Sequence[Tensor],
    rule: str,
    key: str = "momentum_buffer",
    dtype: Callable[[Tensor], torch.dtype] | None = None,
    needs: tuple[str, ...] = (),
) -> DescribedGradientMemory:
    """A momentum of each parameter's shape, in the state under `key`."""
    return DescribedGradientMemory(
        name="momentum",
        keys=(key,),
        state_bytes=like_bytes(params, 1, dtype),
        objective=DOT,
        rule=rule,
        needs=needs,
    )


def average(name: str, value: str, decay: float) -> str:
    """The rule of an exponential average, `m ← 0.9 m + 0.1 g`."""
    return f"{name} ← {_mixture(name, value, decay)}"


def _mixture(name: str, value: str, decay: float) -> str:
    return f"{decay:g} {name} + {1 - decay:g} {value}"


def looking_ahead(name: str, decay: float, nesterov: bool) -> str:
    """Term of an average in a step: the average itself, or with the gradient taken in once more."""
    return _mixture(name, "g", decay) if nesterov else name


@describes_optimizer(torch.optim.SGD)
def _sgd(optimizer: torch.optim.SGD, group: Group) -> Iterator[OptimizerRule]:
    params, decay = group["params"], group["momentum"]
    if decay == 0:
        yield OptimizerRule(params=params, step="W ← W − lr·g")
        return
    taken = f"{1 - group['dampening']:g} g" if group["dampening"] else "g"
    momentum = momentum_of(params, f"m ← {decay:g} m + {taken} (eq 33)")
    read = f"(g + {decay:g} m)" if group["nesterov"] else "m"
    yield OptimizerRule(params=params, step=f"W ← W − lr·{read}", memories=(momentum,))


@describes_optimizer(torch.optim.Adam, torch.optim.AdamW)
def _adam(optimizer: torch.optim.Adam, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    memory = DescribedGradientMemory(
        name="moments",
        keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
        state_bytes=like_bytes(params, 3 if group["amsgrad"] else 2)
        + _counter_bytes(params, bool(group["fused"])),
        objective=ADAM_OBJECTIVE,
        rule=adam_rule(*group["betas"]),
    )
    yield OptimizerRule(params=params, step=ADAM_STEP, memories=(memory,))


def adam_rule(beta1: float, beta2: float) -> str:
    """The rule of Adam's memory, with its decays."""
    return f"averages of g and g², β = {float(beta1):g}, {float(beta2):g}"


@describes_optimizer(torch.optim.Adagrad)
def _adagrad(optimizer: torch.optim.Adagrad, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    memory = DescribedGradientMemory(
        name="sum of squares",
        keys=("sum", "step"),
        state_bytes=like_bytes(params, 1) + _counter_bytes(params, bool(group.get("fused"))),
        objective=ADAGRAD_OBJECTIVE,
        rule="H ← H + g²",
    )
    yield OptimizerRule(params=params, step="W ← W − lr·g/(√H + ε)", memories=(memory,))


@describes_optimizer(torch.optim.RMSprop)
def _rmsprop(optimizer: torch.optim.RMSprop, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    square = DescribedGradientMemory(
        name="square average",
        keys=("square_avg", "grad_avg", "step"),
        state_bytes=like_bytes(params, 2 if group["centered"] else 1) + _counter_bytes(params),
        objective="½‖v − g²‖²" + (", and ½‖m − g‖²" if group["centered"] else ""),
        rule=average("v", "g²", group["alpha"]),
    )
    if group["momentum"] == 0:
        yield OptimizerRule(params=params, step="W ← W − lr·g/(√v + ε)", memories=(square,))
        return
    momentum = momentum_of(params, f"m ← {group['momentum']:g} m + g/(√v + ε)", needs=(square.name,))
    yield OptimizerRule(params=params, step="W ← W − lr·m", memories=(square, momentum))


@describes_optimizer(torch.optim.Muon)
def _muon(optimizer: torch.optim.Muon, group: Group) -> Iterator[OptimizerRule]:
    params = group["params"]
    momentum = momentum_of(params, average("m", "g", group["momentum"]))
    read = looking_ahead("m", group["momentum"], group["nesterov"])
    yield OptimizerRule(params=params, step=f"W ← W − lr·NewtonSchulz({read}) (eq 52)", memories=(momentum,))
