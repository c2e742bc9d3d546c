"""Anchors that files hold: background text, and a Fisher diagonal that is measured on it where missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning._files import writable
from nested_learning.continual.inputs import most_positions
from nested_learning.continual.level import Level
from nested_learning.continual.objectives.fisher import Fisher

LENGTH = 256  # most tokens of a sequence of the background


@dataclass(frozen=True)
class AnchorFiles:
    """Files of what `stack_levels` takes as `background` and `fisher`.

    Args:
        background: path of a text in UTF-8, for levels with `Level.anchor_kl`; None for none.
        fisher: path of a diagonal that `Fisher.save` wrote, for levels with `Level.decay`; where there is no
            such file, it is measured on the background and written there.

    Raises:
        ValueError: the text is not in UTF-8, or there is no diagonal and no text to measure it on.
        OSError: a file cannot be read, or the one to come not be written.
    """

    background: str | None = None
    fisher: str | None = None

    def __post_init__(self) -> None:
        self._text()
        if self.fisher is None or Path(self.fisher).exists():
            return
        if self.background is None:
            raise ValueError(
                f"fisher is {self.fisher}, but there is no such file, and no background to measure it on: "
                "give a text as background, or the file that Fisher.save wrote"
            )
        writable(self.fisher)  # refused before a large model is loaded

    def __bool__(self) -> bool:
        return self.background is not None or self.fisher is not None

    def of(self, model: Any, tokenizer: Any, levels: Sequence[Level] | None = None) -> dict[str, Any]:
        """Arguments of `stack_levels`, or of `reopen`.

        Args:
            model: the base model.
            tokenizer: its tokenizer.
            levels: the levels; None where a memory file tells them, which has been learned with both.

        Raises:
            ValueError: no level has use for one of them, or as `Fisher.of` and `Fisher.load`.
        """
        found: dict[str, Any] = {}
        decaying = levels is None or any(level.decay for level in levels)
        if self.fisher is not None:
            if not decaying:
                raise ValueError(
                    f"fisher is {self.fisher}, but no level has a decay for it to scale: set one, or leave "
                    "fisher out"
                )
            found["fisher"] = self._diagonal(model, tokenizer, new=levels is not None)
        pulled = levels is None or any(level.anchor_kl for level in levels)
        # the text of a diagonal stays in the command that finds it measured
        if self.background is not None and (pulled or self.fisher is None):
            found["background"] = self._text()
        return found

    def _text(self) -> str | None:
        if self.background is None:
            return None
        try:
            return Path(self.background).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the background {self.background!r} is not in UTF-8 ({error}); convert it first"
            ) from error

    def _diagonal(self, model: Any, tokenizer: Any, new: bool) -> Fisher:
        assert self.fisher is not None
        if Path(self.fisher).exists():
            return Fisher.load(self.fisher)
        if not new:
            raise ValueError(
                f"fisher is {self.fisher}, but there is no such file; a memory belongs to the diagonal that "
                "it was learned with, so no other is measured: give that file"
            )
        text = self._text()
        assert text is not None
        fisher = Fisher.of(model, text, tokenizer, length=min(LENGTH, most_positions(model)))
        fisher.save(self.fisher)
        return fisher
