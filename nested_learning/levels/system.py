"""A nested system as data: components, their update frequencies, levels, and what passes between them.

Definition 2 of "Nested Learning" (arXiv 2512.24695) orders components: A is faster than B if it is updated
more often, or equally often and B's state at a time needs A's state at that time. Components that are not
ordered by it and have one frequency form a level.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

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
        every: so many tokens or steps per update; 1 for the other units.

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
        """Sorts frequencies from the highest to the lowest."""
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
    """Updated every `count` tokens."""
    return Frequency("token", count)


def every_steps(count: int = 1) -> Frequency:
    """Updated every `count` optimizer steps."""
    return Frequency("step", count)


@dataclass(frozen=True, kw_only=True)
class Component:
    """One associative memory, or all memories of one kind, which differ in nothing but where they are.

    Attributes:
        name: unique in its system.
        kind: "memory" learns or remembers in context, "optimizer" is a memory of gradients, "weights" are
            parameters.
        frequency: of its updates.
        parameters: how many of the model's parameters it is; 0 for memories and optimizers, whose initial
            states, where they are parameters, are components of their own.
        state_bytes: bytes of the tensors that hold its state; None where that is not known.
        state_per: what has so many bytes: the "model", each running "sequence", or each "token" in context.
        measured: the bytes were counted on tensors that exist, not computed from shapes.
        context: its context flow, what it compresses.
        objective: what its updates minimise.
        rule: how it is updated.
        where: the modules that have one, by name; empty for an optimizer's memory.
        needs: names of components whose state at the same time its update needs.
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
    where: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        frequency = {"unit": self.frequency.unit, "every": self.frequency.every, "text": str(self.frequency)}
        return fields | {"frequency": frequency, "where": list(self.where), "needs": list(self.needs)}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A way in which knowledge passes (§3.3), from each of the sources to each of the targets.

    Attributes:
        sources, targets: names of components.
        kind: see `TransferKind`.
        what: passes.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    kind: TransferKind
    what: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        lists = {"sources": list(self.sources), "targets": list(self.targets)}
        return {**lists, "kind": self.kind, "what": self.what}


@dataclass(frozen=True)
class Level:
    """Components of one frequency, none of which is faster than another.

    Attributes:
        number: from 1, the fastest.
        components: in no order that means anything.
    """

    number: int
    components: tuple[Component, ...]

    @property
    def frequency(self) -> Frequency:
        """That of all its components."""
        return self.components[0].frequency

    @property
    def parameters(self) -> int:
        """Of all its components."""
        return sum(component.parameters for component in self.components)

    def __str__(self) -> str:
        return f"level {self.number}: {self.frequency}"


@dataclass(frozen=True)
class NestedSystem:
    """What `levels` returns. `print` shows it as text, `rich.print` as a table and a tree.

    Attributes:
        name: of the model's class.
        optimizer: names of the optimizers' classes, or "none".
        levels: from the fastest to the slowest.
        transfers: between the components.
    """

    name: str
    optimizer: str
    levels: tuple[Level, ...]
    transfers: tuple[Transfer, ...]

    @property
    def components(self) -> tuple[Component, ...]:
        """All of them, level by level."""
        return tuple(component for level in self.levels for component in level.components)

    @property
    def parameters(self) -> int:
        """The model's parameters, each counted once."""
        return sum(level.parameters for level in self.levels)

    def __getitem__(self, name: str) -> Component:
        """The component called `name`. KeyError where there is none."""
        return {component.name: component for component in self.components}[name]

    def to_dict(self) -> dict[str, Any]:
        """The whole system in lists, dicts, strings and numbers: what `json.dumps` takes."""
        return {
            "format": "nested_learning.levels",
            "version": 1,
            "model": self.name,
            "optimizer": self.optimizer,
            "parameters": self.parameters,
            "levels": [
                {
                    "level": level.number,
                    "frequency": str(level.frequency),
                    "parameters": level.parameters,
                    "components": [component.to_dict() for component in level.components],
                }
                for level in self.levels
            ],
            "transfers": [transfer.to_dict() for transfer in self.transfers],
        }

    def __str__(self) -> str:
        from nested_learning.levels.text import to_text

        return to_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from nested_learning.levels.text import table, tree

        yield table(self)
        yield tree(self)

    def to_mermaid(self) -> str:
        """A Mermaid flowchart: a box per level, arrows for what passes."""
        from nested_learning.levels.mermaid import to_mermaid

        return to_mermaid(self)

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: a band per level, arrows between levels. A file at `path` is replaced."""
        from nested_learning.levels.figure import save_png

        save_png(self, path)


def in_levels(components: Sequence[Component]) -> tuple[Level, ...]:
    """Definition 2: by frequency, and within a frequency by who needs whose state.

    Components of one frequency that need each other by no chain go to the slowest level they can.

    Raises:
        ValueError: components of one frequency need each other in a circle.
    """
    height = _heights(components)

    def key(component: Component) -> tuple[int, int, int]:
        return *component.frequency.rank, -height(component.name)

    grouped: Iterator[tuple[Any, Iterator[Component]]] = groupby(sorted(components, key=key), key=key)
    return tuple(Level(number, tuple(members)) for number, (_, members) in enumerate(grouped, 1))


def _heights(components: Sequence[Component]) -> Callable[[str], int]:
    """How long the chain is of components of the same frequency that need a component's state."""
    frequency = {component.name: component.frequency for component in components}
    needed_by: dict[str, list[str]] = {name: [] for name in frequency}
    for component in components:
        for other in component.needs:
            if frequency[other] == component.frequency:
                needed_by[other].append(component.name)
    known: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"components need each other in a circle: {' ← '.join((*above, name))}")
        if name not in known:
            known[name] = max((1 + height(other, (*above, name)) for other in needed_by[name]), default=0)
        return known[name]

    return height
