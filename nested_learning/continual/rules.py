"""Inner rules: from the clipped gradient of a chunk to the direction of a level's write.

A rule's state is a value, one dict of tensors per slot (a slot is one matrix of a delta). The memory forms
and M3 are those of `nested_learning.optimizers`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nested_learning._errors import unknown
from nested_learning.memory.state import Weights
from nested_learning.optimizers import M3
from nested_learning.optimizers.memory_forms import (
    MEMORIES,
    AdamMemory,
    GradientMemory,
    MomentumMemory,
    memory_direction,
)

RuleState = dict[str, dict[str, Tensor]]


class Step(NamedTuple):
    """`factor` · `directions[slot]` is what lr multiplies; the factor spares a pass over the tensors."""

    directions: Weights
    state: RuleState
    factor: float


class Rule(Protocol):
    """Attributes: `kept`, how many tensors of a slot's size the state has, for the memory budget; `dropped`,
    names of fields that states of this rule do not have, but files of earlier versions may."""

    @property
    def kept(self) -> int: ...

    @property
    def dropped(self) -> tuple[str, ...]: ...

    def step(self, state: RuleState, grads: Weights, scale: float) -> Step:
        """One write with the gradients `scale` · `grads`; nothing that is given changes."""

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        """State of a slot before its first write."""


class PlainGradient:
    """Gradient descent: the direction is the gradient. No state."""

    kept = 0
    dropped = ()

    def step(self, state: RuleState, grads: Weights, scale: float) -> Step:
        return Step(grads, {}, scale)

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        return {}


def _scaled(g: Tensor, scale: float) -> Tensor:
    """`scale` · g, at least in float32: the states of rules take its precision."""
    return g.to(torch.promote_types(g.dtype, torch.float32)) * scale


class FormRule:
    """A memory form of `optimizers.memory_forms`, element by element.

    What the form names as `spare` is not kept between writes.
    """

    def __init__(self, memory: GradientMemory) -> None:
        self.memory = memory
        self.dropped: tuple[str, ...] = tuple(getattr(memory, "spare", ()))
        probe = torch.ones(2, 3, device="cpu")  # here, as nothing is computed where a model is described
        self.kept: int = sum(t.shape == probe.shape for t in self.empty(probe).values())

    def step(self, state: RuleState, grads: Weights, scale: float) -> Step:
        directions: Weights = {}
        new: RuleState = {}
        for slot, g in grads.items():
            scaled = _scaled(g, scale)
            stored = dict(state.get(slot, {}))
            if stored:
                unread = scaled.new_zeros(()).expand_as(scaled)  # stands for what no update looks at
                stored = {**dict.fromkeys(self.dropped, unread), **stored}
            directions[slot] = memory_direction(self.memory, stored, scaled)
            if needed := self._needed(stored):
                new[slot] = needed
        return Step(directions, new, 1.0)

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        return self._needed(self.memory.init(like)._asdict())

    def _needed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {field: t for field, t in state.items() if field not in self.dropped}


class M3Rule:
    """`optimizers.M3` with its defaults: fast and slow momentum, both orthogonalised (Algorithm 1).

    The optimizer's step at learning rate 1 from zero weights is the negative direction.
    """

    kept = 4
    dropped = ()

    def step(self, state: RuleState, grads: Weights, scale: float) -> Step:
        scaled = {slot: _scaled(g, scale) for slot, g in grads.items()}
        weights = {slot: torch.zeros_like(g) for slot, g in scaled.items()}
        optimizer = M3(list(weights.values()), lr=1.0)
        for slot, weight in weights.items():
            weight.grad = scaled[slot]
            stored: dict[str, Any] = {
                key: t.to(weight.dtype if t.is_floating_point() else t.dtype, copy=True)
                for key, t in state.get(slot, {}).items()
            }
            if stored:
                stored["step"] = int(stored["step"])
            optimizer.state[weight] = stored
        optimizer.step()
        new = {
            slot: {
                key: value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
                for key, value in optimizer.state[weight].items()
            }
            for slot, weight in weights.items()
        }
        return Step(weights, new, -1.0)

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        return {}  # the optimizer makes it


class PerExpert:
    """A rule that takes matrices, for slots that are stacks of them [E, m, n]: each expert has its own.

    The state of a stack is the states of its matrices, stacked.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @property
    def kept(self) -> int:
        return self.rule.kept

    @property
    def dropped(self) -> tuple[str, ...]:
        return self.rule.dropped

    def step(self, state: RuleState, grads: Weights, scale: float) -> Step:
        stacks = {slot: len(g) for slot, g in grads.items() if g.ndim == 3}
        if not stacks:
            return self.rule.step(state, grads, scale)
        single = {slot: g for slot, g in grads.items() if slot not in stacks}
        kept = {slot: state[slot] for slot in single if slot in state}
        for slot, experts in stacks.items():
            for e in range(experts):
                single[f"{slot}/{e}"] = grads[slot][e]
                kept[f"{slot}/{e}"] = {field: t[e] for field, t in state.get(slot, {}).items()}
        directions, new, factor = self.rule.step(kept, single, scale)
        for slot, experts in stacks.items():
            own = [f"{slot}/{e}" for e in range(experts)]
            directions[slot] = torch.stack([directions.pop(name) for name in own])
            states = [new.pop(name, {}) for name in own]
            if states[0]:
                new[slot] = {field: torch.stack([each[field] for each in states]) for field in states[0]}
        return Step(directions, new, factor)

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        return self.rule.empty(like)


_NAMED: dict[str, Rule] = {
    "gd": PlainGradient(),
    "momentum": FormRule(MomentumMemory()),
    "adam": FormRule(AdamMemory()),
    "rms": FormRule(AdamMemory((0.0, 0.99))),  # the gradient by the root of its running mean square
    "m3": PerExpert(M3Rule()),
}


def acts_by_row(rule: Rule) -> bool:
    """Whether each row of a matrix is written as if it were alone: tried on a small one, twice."""
    whole: RuleState = {}
    alone: list[RuleState] = [{}, {}]
    probe = torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 2.0]], device="cpu")
    for g in (probe, probe.flip(1)):
        step = rule.step(whole, {"probe": g}, 1.0)
        steps = [rule.step(state, {"probe": row}, 1.0) for state, row in zip(alone, g.split(1), strict=True)]
        whole, alone = step.state, [each.state for each in steps]
        rows = torch.cat([each.directions["probe"] for each in steps])
        if not torch.allclose(step.directions["probe"], rows, rtol=1e-4, atol=1e-5):
            return False
    return True


def rule_name(name: str) -> str:
    """The name of a rule by which levels and memory files know it: "sgd" is another word for "gd"."""
    return "gd" if name == "sgd" else name


def resolve_rule(rule: str | GradientMemory) -> Rule:
    """The rule of a name or of a memory form.

    Raises:
        ValueError: an unknown name, or an object without init, update and read.
    """
    if isinstance(rule, str):
        if rule not in _NAMED:
            raise unknown("rule", rule, _NAMED)
        return _NAMED[rule]
    if not all(callable(getattr(rule, method, None)) for method in ("init", "update", "read")):
        raise ValueError(
            f"rule must be one of {', '.join(_NAMED)} or an object with init, update and read, got {rule!r}"
        )
    form = FormRule(rule)
    return form if type(rule) in MEMORIES.values() else PerExpert(form)  # one of these mixes no elements
