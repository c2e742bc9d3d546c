"""The data of a nested system: its components, how often each is updated, its levels, and what passes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["infinite", "token", "step", "never"]
Holder = Literal["model", "sequence", "token"]
Kind = Literal["memory", "optimizer", "weights"]
# Section 3.3 of the paper: how one level's knowledge reaches another.
TransferKind = Literal[
    "conditioning on output",
    "conditioning on weights",
    "backpropagation",
    "initial state",
    "generation of weights",
    "generation of context",
]

_UNITS: tuple[Unit, ...] = ("infinite", "token", "step", "never")  # from the fastest to the slowest


@dataclass(frozen=True)
class Frequency:
    """How often a component is updated, that is: how often what the others read of it changes.

    Attributes:
        unit: "infinite" (a non-parametric memory: it has no state to update, each answer is computed from
            its whole context), "token", "step" (of the optimizer) or "never".
        every: number of tokens or steps per update; 1 for the other units.

    Every frequency in tokens counts as higher than every one in optimizer steps, as a step reads whole
    sequences (ours: the paper compares updates per unit of time, and a step has no fixed length in tokens).
    """

    unit: Unit
    every: int = 1

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"the unit of a frequency is one of {', '.join(_UNITS)}; got {self.unit!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"a frequency is every 1, 2, … {self.unit}s; got {self.every!r}")
        if self.every > 1 and self.unit in ("infinite", "never"):
            raise ValueError(f"{self.unit!r} takes no interval, got every={self.every}")

    @property
    def rank(self) -> tuple[int, int]:
        """Key that sorts frequencies from the highest to the lowest."""
        return _UNITS.index(self.unit), self.every

    def __str__(self) -> str:
        if self.unit == "infinite":
            return "∞ (non-parametric)"
        if self.unit == "never":
            return "never"
        noun = "token" if self.unit == "token" else "optimizer step"
        return f"every {noun}" if self.every == 1 else f"every {self.every:,} {noun}s"


INFINITE = Frequency("infinite")
NEVER = Frequency("never")


def every_tokens(count: int = 1) -> Frequency:
    """Frequency of one update every `count` tokens."""
    return Frequency("token", count)


def every_steps(count: int = 1) -> Frequency:
    """Frequency of one update every `count` optimizer steps."""
    return Frequency("step", count)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One associative memory, or all memories of one kind, which differ in nothing but where they are.

    Attributes:
        name: unique in its system.
        kind: "memory" learns or remembers in context, "optimizer" is a memory of gradients, "weights" are
            parameters.
        frequency: how often it is updated.
        parameters: number of the model's parameters in it; 0 for memories and optimizers, whose initial
            states, where they are parameters, are components of their own.
        state_bytes: bytes of the tensors that hold its state; None where that is not known.
        state_per: what has so many bytes: the "model", each running "sequence", or each "token" in context.
        measured: whether the bytes were counted on tensors that exist, not computed from shapes.
        context: its context flow, what it compresses.
        objective: what its updates minimise.
        rule: how it is updated.
        part: handles of its parameters, for an optimizer's memory of those that it trains; see
            `nested_learning.parts`. Empty for memories in context.
        where: names of the modules that have one; empty for an optimizer's memory.
        needs: names of the components whose state at the same time its update needs.
    """

    name: str
    kind: Kind
    frequency: Frequency
    parameters: int = 0
    state_bytes: int | None = None
    state_per: Holder = "model"
    measured: bool = False
    context: str = ""
    objective: str = ""
    rule: str = ""
    part: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields in dicts, lists, strings and numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        frequency = {"unit": self.frequency.unit, "every": self.frequency.every, "text": str(self.frequency)}
        lists = {name: list(fields[name]) for name in ("part", "where", "needs")}
        return fields | {"frequency": frequency, **lists}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Knowledge that passes in one way (§3.3) from each of the sources to each of the targets.

    Attributes:
        sources, targets: names of components.
        kind: one of `TransferKind`.
        what: name of what passes, such as "gradients".
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    kind: TransferKind
    what: str

    def to_dict(self) -> dict[str, Any]:
        """The fields in dicts, lists, strings and numbers."""
        lists = {"sources": list(self.sources), "targets": list(self.targets)}
        return {**lists, "kind": self.kind, "what": self.what}


@dataclass(frozen=True)
class DescribedLevel:
    """Components of one frequency, none of which is faster than another.

    Attributes:
        number: 1 for the fastest level.
        components: members of the level, in no order that means anything.
    """

    number: int
    components: tuple[Component, ...]

    @property
    def frequency(self) -> Frequency:
        """Frequency that all its components have."""
        return self.components[0].frequency

    @property
    def parameters(self) -> int:
        """Number of parameters in all its components."""
        return sum(component.parameters for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        """The fields in dicts, lists, strings and numbers."""
        return {
            "level": self.number,
            "frequency": str(self.frequency),
            "parameters": self.parameters,
            "components": [component.to_dict() for component in self.components],
        }

    def __str__(self) -> str:
        return f"level {self.number}: {self.frequency}"
