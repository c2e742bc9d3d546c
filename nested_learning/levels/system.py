"""A nested system: its levels, what passes between them, and the ways to show both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rich.console import Group

from nested_learning.levels.components import Component, DescribedLevel, Transfer
from nested_learning.levels.render.figure import save_png
from nested_learning.levels.render.mermaid import to_mermaid
from nested_learning.levels.render.text import table, to_text, tree


@dataclass(frozen=True)
class NestedSystem:
    """A model and its optimizers as levels. `print` shows it as text, `rich.print` as a table and a tree.

    Attributes:
        name: the class of the model.
        optimizer: the optimizers' classes, or "none".
        levels: from the fastest to the slowest.
        transfers: between the components.
    """

    name: str
    optimizer: str
    levels: tuple[DescribedLevel, ...]
    transfers: tuple[Transfer, ...]

    @property
    def components(self) -> tuple[Component, ...]:
        """All components, level by level."""
        return tuple(component for level in self.levels for component in level.components)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters, each counted once."""
        return sum(level.parameters for level in self.levels)

    @property
    def title(self) -> str:
        """Model, optimizers and number of parameters in one line: the headline of text and picture."""
        return f"{self.name}, optimizer {self.optimizer}, {self.parameters:,} parameters"

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
            "levels": [level.to_dict() for level in self.levels],
            "transfers": [transfer.to_dict() for transfer in self.transfers],
        }

    def __rich__(self) -> Group:
        return Group(table(self.title, self.levels), tree(self.levels, self.transfers))

    def __str__(self) -> str:
        return to_text(self.__rich__())

    def to_mermaid(self) -> str:
        """A Mermaid flowchart: a box per level, arrows for what passes."""
        return to_mermaid(self.levels, self.transfers)

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: a band per level, arrows between levels. A file at `path` is replaced."""
        save_png(self.title, self.levels, self.transfers, path)
