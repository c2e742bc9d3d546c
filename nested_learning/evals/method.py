"""Methods that take part in an evaluation: something that trains or learns, and then answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

MethodT = TypeVar("MethodT", bound="Method")


@dataclass(frozen=True)
class Method:
    """A contestant. What it can do is said by its class; tasks name the classes that they take.

    Instances are values: frozen, of fields that JSON can hold, since a run is kept under `describe()` and may
    take place in another process.

    Attributes:
        kind: one word for the class, as in messages: "model", "pretrained", "optimizer".
        name: in lower case, as the command line and the tables have it.
        settings: what a task's `grid` chose: learning rate, penalty, …
    """

    kind: ClassVar[str]
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def at(self: MethodT, settings: Mapping[str, Any]) -> MethodT:
        """The method with these settings in addition."""
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def describe(self) -> dict[str, Any]:
        """All that decides what it does."""
        return {"kind": self.kind, **dataclasses.asdict(self)}
