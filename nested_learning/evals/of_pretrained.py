"""Tasks that are put to a pretrained model and to ways of letting it learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nested_learning.evals.data_files import missing_files
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import PretrainedMethod, lacking
from nested_learning.evals.methods.pretrained.base import RANDOM
from nested_learning.evals.task import OptionsT, Task


class OfPretrained(Task[OptionsT]):
    """A task whose options name a pretrained model (`model`) and chunks of levels (`chunks`).

    Attributes:
        chosen: methods of the table.
    """

    chosen: ClassVar[tuple[PretrainedMethod, ...]]

    def methods(self) -> Sequence[PretrainedMethod]:
        """Methods of the table that this machine has the packages for."""
        return [method for method in self.tabled() if self.lacking(method) is None]

    def tabled(self) -> Sequence[PretrainedMethod]:
        return list(self.chosen)

    def lacking(self, method: Method) -> str | None:
        return method.lacking() if isinstance(method, PretrainedMethod) else None

    def accepts(self, method: Method) -> str | None:
        """Why the task cannot be put to a method: its kind, what it needs (`unfit`), a missing package."""
        if not isinstance(method, PretrainedMethod):
            return super().accepts(method)
        return self.unfit(method) or self.lacking(method)

    def unfit(self, method: PretrainedMethod) -> str | None:
        """Why what the task reads is not what the method needs; None: it is."""
        return None

    def missing(self) -> str | None:
        """The model, where this machine has it not."""
        return lacking(self._model)

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Tokens between two writes of the three levels; a list where the command line gave them."""
        options: Any = self.options
        fast, middle, slow = options.chunks
        return fast, middle, slow

    @property
    def _model(self) -> str:
        options: Any = self.options
        return str(options.model)

    def remarks(self) -> list[str]:
        """Sentences of a note: that a random model stands in, and which methods of the table are left out."""
        words = []
        if self._model == RANDOM:
            words.append("A small random model stands in for a pretrained one: the figures mean nothing.")
        for method in self.chosen:
            if problem := method.lacking():
                words.append(f"Without {method.name}: {problem}.")
        return words


class ReadsText(OfPretrained[OptionsT]):
    """A task of running text, whose options name a folder (`data`) and how many rates are tried (`rates`).

    Attributes:
        grids: learning rates by method.
        files: what the folder has to have.
    """

    grids: ClassVar[Mapping[str, Sequence[float]]]
    files: ClassVar[tuple[str, ...]]

    def unfit(self, method: PretrainedMethod) -> str | None:
        known = sorted({*self.grids, *(each.name for each in self.chosen)})
        return None if method.name in known else f"{method.name!r} needs examples; {self.name} takes {known}"

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        options: Any = self.options
        return [{"lr": rate} for rate in self.grids.get(method.name, ())[: options.rates]] or [{}]

    def missing(self) -> str | None:
        options: Any = self.options
        return super().missing() or missing_files(options.data, self.files)
