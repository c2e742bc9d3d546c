"""Descriptions of optimizers as memories of gradients: this package's and torch's.

State bytes are what a parameter's state will be once it has had a gradient; a test compares each with the
state after a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning import optimizers as ours
from nested_learning.levels.describe.registry import (
    DescribedGradientMemory,
    OptimizerRule,
    describer_of,
    describes_optimizer,
)
from nested_learning.levels.describe.torch_optimizers import (
    ADAGRAD_OBJECTIVE,
    ADAM_OBJECTIVE,
    ADAM_STEP,
    DOT,
    adam_rule,
    average,
    like_bytes,
    looking_ahead,
    momentum_of,
)
from nested_learning.optimizers import row_memory
from nested_learning.optimizers.arithmetic import Group, as_matrix, tensor_bytes, work_dtype
from nested_learning.optimizers.base import BaseOptimizer
from nested_learning.optimizers.delta_gd import INPUTS, no_inputs
from nested_learning.optimizers.multi_frequency import COUNTED_KEYS, WAITING


def rules_of(optimizer: Optimizer, group: Group) -> list[OptimizerRule]:
    """How the optimizer trains the parameters of a group; those that need no gradient are left out."""
    group = {**group, "params": [p for p in group["params"] if p.requires_grad]}
    if not group["params"]:
        return []
    describe = describer_of(optimizer) or _unknown
    return list(describe(optimizer, group))


def _unknown(optimizer: Optimizer, group: Group) -> Iterator[OptimizerRule]:
    """An optimizer without a description, taken at its word: a memory of the tensors of its state.

    One of this package's kind says which of them have their parameter's shape. The gradients that wait in
    the state for a MultiFrequency around it are none of its own.
    """
    foreign = WAITING if set(COUNTED_KEYS) <= set(group) else ()
    states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    sizes = [(key, tensor_bytes(state[key])) for state in states for key in state if key not in foreign]
    shaped = optimizer.parameter_shaped if isinstance(optimizer, BaseOptimizer) else ()
    held = [key for key, size in sizes if size] or [key for key, _ in sizes]
    keys = tuple(dict.fromkeys(held)) or shaped
    memory = DescribedGradientMemory(
        name="state",
        keys=keys,
        state_bytes=like_bytes(group["params"], len(shaped), work_dtype) if shaped else None,
        objective="unknown: the optimizer has no description",
        rule=f"unknown; holds {', '.join(map(str, keys))}" if keys else "unknown; nothing is held yet",
    )
    yield OptimizerRule(params=group["params"], step="unknown rule, assumed every step", memories=(memory,))


# Name, objective and rule of the memory forms of this package; other forms are shown by their class.
CLASSICS = {
    ours.GDMemory: ("last gradient", "−⟨m, g⟩, of the last gradient alone", "m ← g (eq 1)"),
    ours.MomentumMemory: ("momentum", DOT, "m ← α m + g (eq 33)"),
    ours.AdamMemory: ("moments", ADAM_OBJECTIVE, "averages of g and g²"),
    ours.AdaGradMemory: ("sum of squares", ADAGRAD_OBJECTIVE, "H ← H + g²"),
}


def memory_form(memory: ours.GradientMemory, params: Sequence[Tensor]) -> DescribedGradientMemory:
    """The description of a memory form (init, update, read) that serves these parameters."""
    unnamed = (type(memory).__name__, "that of its class", "that of its class")
    name, objective, rule = CLASSICS.get(type(memory), unnamed)
    states = [memory.init(torch.empty(p.shape, dtype=work_dtype(p), device="meta")) for p in params]
    if isinstance(memory, ours.AdamMemory):
        rule = adam_rule(*memory.betas)
    return DescribedGradientMemory(
        name=name,
        keys=tuple(states[0]._fields),
        state_bytes=tensor_bytes(states),
        objective=objective,
        rule=rule,
    )


@describes_optimizer(ours.MemoryOptimizer)
def _memory_optimizer(optimizer: ours.MemoryOptimizer, group: Group) -> Iterator[OptimizerRule]:
    memory = memory_form(optimizer.memory, group["params"])
    yield OptimizerRule(params=group["params"], step="W ← W − lr·read(memory)", memories=(memory,))


@describes_optimizer(ours.PreconditionedMomentum, ours.DeltaMomentum, ours.FeatureMomentum)
def _momentum(optimizer: Optimizer, group: Group) -> Iterator[OptimizerRule]:
    """A rule per preconditioner: the one given for some parameters, and the group's for the others."""
    given = [p for p in group["params"] if "given" in optimizer.state.get(p, {})]
    rest = [p for p in group["params"] if "given" not in optimizer.state.get(p, {})]
    for params, kind in ((given, "given"), (rest, group["preconditioner"])):
        if not params:
            continue
        before = tuple(_preconditioner(optimizer, params, kind))
        rule = _momentum_rule(optimizer, group, "P " if before else "")
        needs = tuple(memory.name for memory in before)
        momentum = momentum_of(params, rule, "momentum", work_dtype, needs)
        if before:
            momentum = dataclasses.replace(momentum, objective="−⟨m, P g⟩")
        yield OptimizerRule(params=params, step="W ← W − lr·m", memories=(*before, momentum))


def _momentum_rule(optimizer: Optimizer, group: Group, value: str) -> str:
    """The rule of the momentum that takes `value` times the gradient: "P " or nothing."""
    if isinstance(optimizer, ours.DeltaMomentum):
        key = "gᵀg/‖g‖²" if group["scale"] == "normalised" else "gᵀg"
        return f"delta rule: m ← {group['momentum']:g} m − {group['beta']:g} m {key} + {value}g (eq 49)"
    if isinstance(optimizer, ours.FeatureMomentum):
        return f"m ← {group['momentum']:g} m + {value}φ(g), φ a polynomial (eq 51)"
    return f"m ← {group['momentum']:g} m + {value}g (eq 47)"


def _preconditioner(
    optimizer: Optimizer, params: Sequence[Tensor], kind: str
) -> Iterator[DescribedGradientMemory]:
    """The memory that a preconditioner of this kind is; none for the identity."""
    if kind == "given":
        yield DescribedGradientMemory(
            name="given preconditioner",
            keys=("given",),
            state_bytes=sum(tensor_bytes(optimizer.state[p]["given"]) for p in params),
            objective="none",
            rule="fixed",
            every=None,
            context="none",
            reads_gradients=False,
        )
    elif kind == "diagonal":
        yield DescribedGradientMemory(
            name="diagonal preconditioner",
            keys=("square",),
            state_bytes=like_bytes(params, 1, work_dtype),
            objective="½‖v − g²‖²",
            rule="average of g², P = 1/(√v̂ + ε)",
        )
    elif kind == "learned":
        sides = [(min(as_matrix(p).shape), work_dtype(p).itemsize) for p in params]
        yield DescribedGradientMemory(
            name="learned preconditioner",
            keys=("preconditioner",),
            state_bytes=sum(side * side * itemsize for side, itemsize in sides),
            objective="½‖P ĝ − NewtonSchulz(g)‖² (eq 41)",
            rule="gradient descent, P ← P − ζ(P ĝ − V)ĝᵀ",
        )


def _matrices_and_rest(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of a group that Newton-Schulz serves, and the parameters that AdamW trains."""
    params = group["params"]
    matrices = [p for p in params if p.ndim == 2 and not group["adamw_only"]]
    return matrices, [p for p in params if p.ndim != 2 or group["adamw_only"]]


def _adamw(group: Group, params: list[Tensor]) -> Iterator[OptimizerRule]:
    """The rule of the parameters that AdamW trains, if there are any."""
    if params:
        memory = memory_form(ours.AdamMemory(tuple(group["adamw_betas"]), group["adamw_eps"]), params)
        memory = dataclasses.replace(memory, name="moments of AdamW's part")
        yield OptimizerRule(params=params, step=ADAM_STEP, memories=(memory,))


@describes_optimizer(ours.OrthogonalMomentum)
def _orthogonal(optimizer: ours.OrthogonalMomentum, group: Group) -> Iterator[OptimizerRule]:
    matrices, rest = _matrices_and_rest(group)
    if matrices:
        momentum = momentum_of(matrices, average("m", "g", group["momentum"]), "momentum", work_dtype)
        read = looking_ahead("m", group["momentum"], group["nesterov"])
        step = f"W ← W − lr·NewtonSchulz({read}), {group['iteration']} (eq 52)"
        yield OptimizerRule(params=matrices, step=step, memories=(momentum,))
    yield from _adamw(group, rest)


@describes_optimizer(ours.M3)
def _m3(optimizer: ours.M3, group: Group) -> Iterator[OptimizerRule]:
    """M₂ takes each gradient as it comes; what the step reads of it, O₂, changes once per block."""
    matrices, rest = _matrices_and_rest(group)
    if matrices:
        beta1, beta2, beta3 = (f"{beta:g}" for beta in group["betas"])
        fast = DescribedGradientMemory(
            name="fast momentum",
            keys=("momentum", "square"),
            state_bytes=like_bytes(matrices, 2, work_dtype),
            objective=DOT,
            rule=f"M₁ from g with β₁ = {beta1}, V from g² with β₂ = {beta2}",
        )
        slow = DescribedGradientMemory(
            name="slow momentum",
            keys=("slow", "slow_direction"),
            state_bytes=like_bytes(matrices, 2, work_dtype),
            objective=DOT,
            rule=f"M₂ from the sum over {group['frequency']} gradients with β₃ = {beta3}, "
            "read as O₂ = NewtonSchulz(M₂)",
            every=group["frequency"],
        )
        read = f"β₁M₁ + {1 - group['betas'][0]:g} g" if group["nesterov"] else "M₁"
        step = f"W ← W − lr·(NewtonSchulz({read}) + {group['alpha']:g} O₂)/(√V + ε) (Algorithm 1)"
        yield OptimizerRule(params=matrices, step=step, memories=(fast, slow))
    yield from _adamw(group, rest)


DEEP_OBJECTIVES = {
    "dot": "−⟨m(u), P⟩",
    "l2": "½‖m(u) − P‖²",
    "surrogate": "direction and size of P, and steadiness",
}


@describes_optimizer(ours.DeepMomentumGD)
def _deep_momentum(optimizer: ours.DeepMomentumGD, group: Group) -> Iterator[OptimizerRule]:
    shared = optimizer._memories(group)
    memory = DescribedGradientMemory(
        name="deep momentum",
        keys=("weights", "initial", "previous"),
        state_bytes=sum(_network_bytes(group, members[0]) for members in shared),
        objective=DEEP_OBJECTIVES[group["objective"]] + (", P = g" if optimizer.value is None else ""),
        rule=f"gradient descent on {len(shared)} networks, retention {group['momentum']:g} "
        "towards their initial state",
    )
    yield OptimizerRule(params=group["params"], step="W ← W − lr·m(g) (eq 50)", memories=(memory,))


def _network_bytes(group: Group, owner: Tensor) -> int:
    """Bytes of a network θ and its initial θ₀, and of the last mean row where the objective reads it."""
    shape, dtype = as_matrix(owner).shape, work_dtype(owner)
    like = torch.empty(0, dtype=dtype, device="meta")
    network = row_memory.init(shape, group["depth"], group["hidden_size"], group["rank"], like, group["seed"])
    previous = shape[1] * dtype.itemsize if group["objective"] == "surrogate" else 0
    return 2 * tensor_bytes(network) + previous


@describes_optimizer(ours.DeltaGD)
def _delta_gd(optimizer: ours.DeltaGD, group: Group) -> Iterator[OptimizerRule]:
    layers = {id(layer.weight) for layer in optimizer._hooks}
    if not layers:
        raise ValueError(
            "DeltaGD is not attached to a model yet, and which parameters it trains by eq 57 depends on it: "
            "call optimizer.attach(model) first"
        )
    maps = [p for p in group["params"] if id(p) in layers]
    rest = [p for p in group["params"] if id(p) not in layers]
    if maps:
        step = "delta gradient descent: W ← (W − lr·g)(I + lr·E[xxᵀ])⁻¹ (eq 57)"
        waiting = (_waiting_inputs(maps),) if group.get("period", 1) > 1 else ()
        yield OptimizerRule(params=maps, step=step, memories=waiting)
    if rest:
        memory = memory_form(optimizer._memory, rest)
        yield OptimizerRule(params=rest, step="W ← W − lr·read(memory)", memories=(memory,))


def _waiting_inputs(maps: Sequence[Tensor]) -> DescribedGradientMemory:
    """What a MultiFrequency lets wait beside the gradients of weights that DeltaGD trains."""
    return DescribedGradientMemory(
        name="sum of x xᵀ",
        keys=INPUTS,
        state_bytes=sum(tensor_bytes(no_inputs(p.detach().to("meta"))) for p in maps),
        objective="−⟨S, x xᵀ⟩, of the inputs x",
        rule="adds x xᵀ up, with the gradients, and is cleared with them",
        context="the layers' inputs",
        reads_gradients=False,
    )


@describes_optimizer(ours.NestedOptimizer)
def _nested(optimizer: ours.NestedOptimizer, group: Group) -> Iterator[OptimizerRule]:
    yield from rules_of(optimizer.owner(group["params"][0]), group)


@describes_optimizer(ours.MultiFrequency)
def _multi_frequency(optimizer: ours.MultiFrequency, group: Group) -> Iterator[OptimizerRule]:
    """The inner optimizer's rules at the group's period, and the sum of gradients in between."""
    period = group["period"]
    for rule in rules_of(optimizer.inner, group):
        memories = tuple(
            dataclasses.replace(memory, every=memory.every * period)
            if memory.every is not None and (memory.reads_gradients or memory.needs)
            else memory
            for memory in rule.memories
        )
        if period > 1:
            total = DescribedGradientMemory(
                name=f"{optimizer.reduction} of {period} gradients",
                keys=("accumulated",),
                state_bytes=like_bytes(rule.params, 1, work_dtype),
                objective=DOT,
                rule=f"adds g up, handed on and cleared every {period} steps (eq 71)",
            )
            memories = (total, *(_after(total, memory) for memory in memories))
        yield dataclasses.replace(rule, memories=memories, period=period * rule.period)


def _after(total: DescribedGradientMemory, memory: DescribedGradientMemory) -> DescribedGradientMemory:
    """The memory with what `total` adds up as its context, in place of single gradients."""
    if not memory.reads_gradients:
        return memory
    needs = (*memory.needs, total.name)
    return dataclasses.replace(memory, reads_gradients=False, needs=needs, context=f"the {total.name}")
