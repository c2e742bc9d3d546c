"""The optimizers' part of a nested system: memories of gradients, and who is trained by which."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning._errors import kind_of
from nested_learning.levels.components import NEVER, Component, every_steps
from nested_learning.levels.describe.optimizers import rules_of
from nested_learning.levels.describe.registry import DescribedGradientMemory, OptimizerRule
from nested_learning.levels.drafts import Draft, Drafts
from nested_learning.optimizers import MultiFrequency, NestedOptimizer
from nested_learning.optimizers.arithmetic import Group, tensor_bytes

# The states of an optimizer and of those inside of it, each by parameter.
NestedStates = list[dict[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Trained:
    """How an optimizer trains a parameter.

    Attributes:
        step: how the parameter moves.
        period: optimizer steps from one move to the next.
        needs: memories that take part.
        reads: memories that the step reads itself.
        fed: memories that the gradient goes to.
    """

    step: str
    period: int
    needs: tuple[Draft, ...]
    reads: tuple[Draft, ...]
    fed: tuple[Draft, ...]


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """The optimizers that a caller gave, unwrapped where they are accelerate's or nested.

    Raises:
        ValueError: it is something else, or has something else in it.
    """
    given = [] if optimizer is None else _several(optimizer)
    for one in given:
        if not isinstance(one, Optimizer):
            raise ValueError(
                f"expected torch optimizers or None, got {kind_of(one)}; give one that is made of the "
                "model's parameters, torch.optim.AdamW(model.parameters()) say, or several in a list"
            )
    wrapped = [getattr(one, "optimizer", None) for one in given]
    plain = [
        inner if isinstance(inner, Optimizer) else one for one, inner in zip(given, wrapped, strict=True)
    ]
    return [part for one in plain for part in (one.optimizers if isinstance(one, NestedOptimizer) else [one])]


def _several(given: Any) -> list[Any]:
    """The things in a list or the like; of anything else the thing itself."""
    if isinstance(given, (Optimizer, str, Mapping)):  # a string's letters or a dict's keys are no optimizers
        return [given]
    try:
        return list(given)
    except TypeError:
        return [given]


def title(optimizer: Optimizer, group: Group) -> str:
    """Name of the optimizer that trains a group; in a level that `build` made, of the one inside."""
    if isinstance(optimizer, MultiFrequency) and "name" in group:
        return title(optimizer.inner, group)
    if isinstance(optimizer, NestedOptimizer):
        return title(optimizer.owner(group["params"][0]), group)
    return type(optimizer).__name__


def titles(optimizers: Sequence[Optimizer]) -> str:
    """Names of all optimizers, each once."""
    names = [title(one, group) for one in optimizers for group in one.param_groups]
    return " and ".join(dict.fromkeys(names)) or "none"


def add_optimizers(
    drafts: Drafts, optimizers: list[Optimizer], parameters: Collection[nn.Parameter]
) -> dict[Tensor, Trained]:
    """Draft the memories of all optimizers; returns how each parameter is trained that one trains.

    Raises:
        ValueError: an optimizer trains none of the parameters, or one of another optimizer's.
    """
    trained: dict[Tensor, Trained] = {}
    for optimizer in optimizers:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if not set(parameters).intersection(own):
            raise ValueError(
                f"{type(optimizer).__name__} trains none of the model's {len(parameters)} parameters: build "
                "it from this model's parameters()"
            )
        if any(p in trained for p in own):
            raise ValueError(f"{type(optimizer).__name__} trains parameters of another of the optimizers")
        trained.update(_add_optimizer(drafts, optimizer))
    return trained


def _add_optimizer(drafts: Drafts, optimizer: Optimizer) -> dict[Tensor, Trained]:
    trained: dict[Tensor, Trained] = {}
    states = _states(optimizer)
    found = 0
    for group in optimizer.param_groups:
        for rule in rules_of(optimizer, group):
            memories: dict[str, Draft] = {}
            for memory in rule.memories:
                held = _held(states, rule.params, memory.keys)
                memories[memory.name] = _add_memory(drafts, title(optimizer, group), memory, held)
                memories[memory.name].parameters.update(dict.fromkeys(rule.params))
                found += held or 0
            trained.update(dict.fromkeys(rule.params, _connect(drafts, rule, memories)))
    # No rule accounts for some state, such as that of parameters that were frozen since.
    total = sum(tensor_bytes(state) for by_parameter in states for state in by_parameter.values())
    if total > found:
        rest = DescribedGradientMemory(
            name="other state", keys=(), state_bytes=None, objective="unknown", rule="unknown"
        )
        _add_memory(drafts, titles([optimizer]), rest, total - found)
    return trained


def _add_memory(drafts: Drafts, owner: str, memory: DescribedGradientMemory, held: int | None) -> Draft:
    """Draft a memory with the bytes that are held of it, or with the predicted ones for None."""
    component = Component(
        name=f"{owner}: {memory.name}",
        kind="optimizer",
        frequency=NEVER if memory.every is None else every_steps(memory.every),
        context=memory.context,
        objective=memory.objective,
        rule=memory.rule,
    )
    return drafts.add(component, memory.state_bytes if held is None else held, measured=held is not None)


def _connect(drafts: Drafts, rule: OptimizerRule, memories: dict[str, Draft]) -> Trained:
    for memory in rule.memories:
        needed = [memories[name] for name in memory.needs]
        memories[memory.name].needs.update(dict.fromkeys(needed))
        drafts.add_pass(needed, [memories[memory.name]], "conditioning on output", "its output")
    inner = {name for memory in rule.memories for name in memory.needs}
    return Trained(
        step=rule.step,
        period=rule.period,
        needs=tuple(memories.values()),
        reads=tuple(draft for name, draft in memories.items() if name not in inner),
        fed=tuple(memories[memory.name] for memory in rule.memories if memory.reads_gradients),
    )


def _states(optimizer: Optimizer) -> NestedStates:
    """The states of an optimizer and of those inside, each once: an outer one may show those of the inner."""
    states: NestedStates = []
    seen: set[int] = set()
    for one in _within(optimizer):
        own = {p: state for p, state in one.state.items() if id(state) not in seen}
        seen.update(map(id, own.values()))
        states.append(own)
    return states


def _within(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, and those that it hands gradients to."""
    yield optimizer
    inside = optimizer.optimizers if isinstance(optimizer, NestedOptimizer) else []
    for one in (*inside, getattr(optimizer, "inner", None)):
        if isinstance(one, Optimizer):
            yield from _within(one)


def _held(states: NestedStates, params: Sequence[Tensor], keys: tuple[str, ...]) -> int | None:
    """Bytes that the states of these parameters hold under these keys; None where there is none of the keys.

    A memory begins when its optimizer first steps for it, which may be long after another of the same
    optimizer: at the end of a period, or with the first gradient of its parameters.
    """
    found = [by_parameter[p] for by_parameter in states for p in params if p in by_parameter]
    held = [state[key] for state in found for key in keys if state.get(key) is not None]
    return sum(map(tensor_bytes, held)) if held else None
