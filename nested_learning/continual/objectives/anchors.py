"""Anchors of levels at the trained model: background text, and a Fisher diagonal that scales the decay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from nested_learning.continual.files import fingerprint
from nested_learning.continual.inputs import TextOrIds, read_batch
from nested_learning.continual.level import Level
from nested_learning.continual.objectives.fisher import Fisher
from nested_learning.continual.starts.starts import Starts
from nested_learning.continual.weights import Workspace


@dataclass(frozen=True, eq=False)
class Background:
    """Text on which levels with `Level.anchor_kl` stay near the base model.

    Attributes:
        texts: ids [T_i] of each text, on the model's device.
    """

    texts: tuple[Tensor, ...]
    _pieces: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)  # by their length

    def piece(self, length: int, number: int) -> Tensor:
        """Piece `number`, from 0 on, again from the start after the last: texts cut into `length` tokens.

        What is left of a text makes a shorter piece, if it has two tokens.
        """
        if length not in self._pieces:
            cut = (piece for text in self.texts for piece in text.split(length))
            self._pieces[length] = [piece for piece in cut if len(piece) > 1]
        pieces = self._pieces[length]
        return pieces[number % len(pieces)]

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the texts, by which a memory file knows them."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{len(text)}:{text.tolist()}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Anchors:
    """Anchors of a learner's levels, and what these begin with: all that is given to them beside the model.

    Attributes:
        background: text of `Level.anchor_kl`; None where no level has one.
        fisher: scale of `Level.decay` for each weight; None for the same share of all.
        starts: learned rates and starts; None where levels begin at zero, with the rates of their settings.
    """

    background: Background | None = None
    fisher: Fisher | None = None
    starts: Starts | None = None

    @classmethod
    def checked(
        cls,
        model: Any,
        tokenizer: Any,
        levels: Sequence[Level],
        background: TextOrIds | None,
        fisher: Fisher | None,
        starts: Starts | None = None,
    ) -> Anchors:
        """The anchors that `stack_levels` was given.

        Raises:
            ValueError: a level needs one that is missing, no level uses one, the background is too short, or
                the Fisher diagonal or the starts are another model's.
        """
        wanted = any(level.anchor_kl for level in levels)
        if wanted != (background is not None):
            raise ValueError(
                "a level has anchor_kl, but there is no background: give stack_levels a text"
                if wanted
                else "got a background, but no level has anchor_kl: give one a weight, or leave it out"
            )
        if fisher is not None:
            _check_fisher(model, levels, fisher)
        if starts is not None:
            with Workspace.of(model).bare():
                starts.check(fingerprint(model), levels)
        if background is None:
            return cls(None, fisher, starts)
        texts = tuple(text for text in read_batch(background, tokenizer, model).rows if len(text) > 1)
        if not texts:
            raise ValueError("the background has no text of two tokens, and one token has none to predict")
        return cls(Background(texts), fisher, starts)

    def identity(self) -> dict[str, str]:
        """Digests of what is in use, by its name: a memory file belongs to it."""
        used = {"background": self.background, "fisher": self.fisher, "starts": self.starts}
        return {name: anchor.digest for name, anchor in used.items() if anchor is not None}


NO_ANCHORS = Anchors()


def _check_fisher(model: Any, levels: Sequence[Level], fisher: Fisher) -> None:
    if not isinstance(fisher, Fisher):
        raise ValueError(f"fisher must be a Fisher, made by Fisher.of or Fisher.load, got {fisher!r}")
    decaying = [level for level in levels if level.decay]
    if not decaying:
        raise ValueError("got a fisher, but no level has a decay for it to scale: set one, or leave it out")
    for level in decaying:
        if level.rank is not None:
            raise ValueError(
                f"fisher scales the decay of each weight by itself, which a delta of rank {level.rank} "
                "cannot follow; set rank=None on levels with decay, or leave fisher out"
            )
        if level.sparse is not None:
            raise ValueError(
                f"fisher scales the decay of each weight, and a level with sparse={level.sparse} keeps the "
                "units alone that it has written; leave sparse out of levels with decay, or leave fisher out"
            )
    with Workspace.of(model).bare():
        ours = fingerprint(model)
    if fisher.fingerprint != ours:
        raise ValueError(
            f"fisher belongs to another base model (fingerprint {fisher.fingerprint[:12]}…, this one has "
            f"{ours[:12]}…): make one with Fisher.of(model, …)"
        )
