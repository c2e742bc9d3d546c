"""Learned rates and starts as a value, and the file of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch

from nested_learning._tensor_files import check_whole, checksum, parse_json, read_tensors, write_tensors
from nested_learning.continual.deltas import DOWN, UP, product
from nested_learning.continual.find import Target
from nested_learning.continual.level import Level, check_levels, without_layers
from nested_learning.memory.state import Weights

FORMAT, VERSION = "nested_learning.continual_starts", "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DESCRIBED = ("levels", "weights", "rates")  # metadata that the sum covers


@dataclass(frozen=True, eq=False)
class LevelStart:
    """Rates and start of one level. Empty for a level that begins as it would without.

    Attributes:
        rates: factor of the level's `lr` for each slot, above 0; 1 where there is none.
        tensors: the start of each slot, by its name. Of a level with full deltas either the whole matrix
            `NAME` in the weight's layout, or two factors `NAME:down` [r, in] and `NAME:up` [out, r], whose
            product it is; of a low-rank level its two factors, `down` also where it does not learn. Stacked
            experts have a stack of each.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    tensors: Weights = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Starts:
    """Rates and starts that `learn_starts` has found, for `stack_levels(starts=…)`.

    A level with them begins at Δ = Δ⁰ instead of at zero, and writes

        Δ_w ← (1 − decay) Δ_w − lr · r_w · rule(clip(G))_w

    to each of its matrices w. They belong to one base model and to levels with the very settings that they
    were learned with.

    Attributes:
        fingerprint: fingerprint of the base model.
        settings: settings of the levels, as `Level.describe` has them.
        weights: names of the weights of each level.
        levels: what each level begins with.
        report: how they were learned, and the losses at it; for people alone.
    """

    fingerprint: str
    settings: tuple[dict[str, Any], ...]
    weights: tuple[tuple[str, ...], ...]
    levels: tuple[LevelStart, ...]
    report: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        rates = [rate for level in self.levels for rate in level.rates.values()]
        span = f", rates × {min(rates):.3g} to {max(rates):.3g}" if rates else ""
        return f"Starts({len(self.levels)} levels{span}; {self.nbytes:,} bytes; {self.digest[:12]}…)"

    @property
    def nbytes(self) -> int:
        """Bytes of the starts."""
        return sum(t.numel() * t.element_size() for level in self.levels for t in level.tensors.values())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all that a level begins with, by which a memory file knows it."""
        return checksum(self._tensors(), self._described(), DESCRIBED)

    def rounded(self, dtype: torch.dtype) -> Starts:
        """Starts of the same rates in another precision: half the file in torch.bfloat16."""
        if dtype not in DTYPES:
            raise ValueError(f"starts are in {', '.join(map(str, DTYPES))}, got {dtype}")
        levels = tuple(
            LevelStart(level.rates, {name: t.to(dtype) for name, t in level.tensors.items()})
            for level in self.levels
        )
        return Starts(self.fingerprint, self.settings, self.weights, levels, self.report)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a checksum, under a temporary name first.

        Raises:
            ValueError, OSError: it cannot be written there; see `Memory.save`.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "report": json.dumps(dict(self.report)),
            **self._described(),
        }
        write_tensors(path, self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Starts:
        """The starts that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another kind of file.
        """
        tensors, metadata = read_tensors(path, "starts")
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ValueError(
                f"{os.fspath(path)} has no learned starts of version {VERSION}: learn some with "
                "learn_starts, or nested-learning adapt --learn_starts"
            )
        try:
            check_whole(tensors, metadata)
            parts = {name: parse_json(metadata[name]) for name in (*DESCRIBED, "report")}
            levels = _levels_of(parts["rates"], tensors)
            settings, weights, report = parts["levels"], parts["weights"], parts["report"]
            for name, kind in (("levels", dict), ("weights", list)):
                found = parts[name]
                if not isinstance(found, list) or [type(own) for own in found] != [kind] * len(levels):
                    raise ValueError(f"its {name} are not those of {len(levels)} levels")
            if not all(isinstance(name, str) for own in cast("list[Any]", weights) for name in own):
                raise ValueError("its weights are no lists of names")
            if not isinstance(report, dict):
                raise ValueError("its report is no object")
            names = tuple(tuple(own) for own in cast("list[list[str]]", weights))
            return cls(
                metadata["fingerprint"],
                tuple(cast("list[dict[str, Any]]", settings)),
                names,
                levels,
                report,
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"its {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{os.fspath(path)} is damaged: {what}") from error

    def make_levels(self) -> tuple[Level, ...]:
        """The levels that the starts were learned for.

        Raises:
            ValueError: one has an inner rule that is no name, or a setting of another version of the package.
        """
        try:
            return check_levels([Level(**settings) for settings in self.settings])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"starts do not tell their levels ({error}): describe these as they were"
            ) from error

    def check(self, fingerprint: str, levels: Sequence[Level]) -> None:
        """Raise ValueError where a learner of this base model and these levels cannot begin with them."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"starts belong to another base model (fingerprint {self.fingerprint[:12]}…, this one has "
                f"{fingerprint[:12]}…): learn some for this one with learn_starts"
            )
        ours = without_layers(json.loads(json.dumps([level.describe() for level in levels])))
        learned_for = without_layers(list(self.settings))  # `of_level` compares weights
        if learned_for != ours:
            theirs, other = _first_difference(learned_for, ours)
            raise ValueError(
                f"starts were learned for levels with {theirs}, this learner has {other}: give it the "
                "levels that they were learned for, or learn some for these with learn_starts"
            )

    def of_level(self, index: int, weights: Sequence[str]) -> LevelStart:
        """Rates and start of level `index`, on weights of these names. ValueError if it has others."""
        start, ours, theirs = self.levels[index], set(weights), set(self.weights[index])
        if (start.rates or start.tensors) and ours != theirs:
            raise ValueError(
                f"starts of level {index} were learned for {len(theirs)} weights, and this learner's level "
                f"has {len(ours)}; only one of them has {min(ours ^ theirs)}: give it the same modules, or "
                "learn some for these with learn_starts"
            )
        return start

    def _tensors(self) -> Weights:
        return {f"{i}/{name}": t for i, level in enumerate(self.levels) for name, t in level.tensors.items()}

    def _described(self) -> dict[str, str]:
        """The settings, the weights and the rates as JSON texts, equal for equal values."""
        parts = (self.settings, self.weights, [dict(level.rates) for level in self.levels])
        texts = (json.dumps(part, sort_keys=True) for part in parts)
        return dict(zip(DESCRIBED, texts, strict=True))


def _levels_of(rates: object, tensors: Weights) -> tuple[LevelStart, ...]:
    """What each level begins with, of the parts of a file. ValueError where one is not what it should be."""
    if not isinstance(rates, list) or not all(isinstance(own, dict) for own in rates):
        raise ValueError("its rates are no list of objects")
    for own in rates:
        for slot, rate in own.items():
            if type(rate) is not float or not 0 < rate < math.inf:
                raise ValueError(f"the rate of {slot} is {rate!r}, expected a finite number above 0")
    starts: list[Weights] = [{} for _ in rates]
    for name, t in tensors.items():
        index, _, own_name = name.partition("/")
        if not index.isdecimal() or int(index) >= len(rates) or not own_name:
            raise ValueError(f"{name} belongs to none of its {len(rates)} levels")
        if t.dtype not in DTYPES or not bool(t.isfinite().all()):
            raise ValueError(f"{name} is {t.dtype}, expected finite numbers in {', '.join(map(str, DTYPES))}")
        starts[int(index)][own_name] = t
    return tuple(LevelStart(own, start) for own, start in zip(rates, starts, strict=True))


def _first_difference(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The first setting in which two lists of levels differ, in words, of both."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} level(s)", f"{len(ours)}"
    for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                return f"{name}={one.get(name)!r} at level {index}", f"{other.get(name)!r}"
    return "other settings", "others"


def start_values(tensors: Weights, targets: Sequence[Target], full: bool) -> Weights:
    """The start of each slot that has one: of a level with full deltas whole matrices.

    Differentiable, and for a level with factors of its own what was given.
    """
    if not full:
        return dict(tensors)
    values = {}
    for target in targets:
        if target.name in tensors:
            values[target.name] = tensors[target.name]
        elif target.name + UP in tensors:
            whole = product(tensors[target.name + DOWN], tensors[target.name + UP])
            values[target.name] = whole.mT if target.transposed else whole
    return values


def check_tensors(
    start: LevelStart,
    targets: Sequence[Target],
    shape: Callable[[str], tuple[int | None, ...]],
    slots: Sequence[str],
    factors: bool,
) -> None:
    """Raise ValueError where a level with these slots cannot begin with it.

    Args:
        start: what the level begins with.
        targets: weights of the level.
        shape: shape of a slot.
        slots: slots that may have a rate.
        factors: whether the level's own deltas are low-rank factors.
    """
    if strange := set(start.rates) - set(slots):
        raise ValueError(f"starts have a rate for {min(strange)}, to which the level does not write")
    left = set(start.tensors)
    for target in targets:
        whole, pair = target.name, (target.name + DOWN, target.name + UP)
        if whole in left and not left.isdisjoint(pair):
            raise ValueError(f"starts have both a matrix and factors for {whole}, expected one of them")
        if not left.isdisjoint(pair):
            found = tuple(tuple(start.tensors[name].shape) if name in left else None for name in pair)
            inputs, outputs = target.features
            rank = found[0][-2] if found[0] and len(found[0]) > 1 else 0
            expected: tuple[Any, ...] = ((*target.stack, rank, inputs), (*target.stack, outputs, rank))
            if factors:
                expected = tuple(shape(name) for name in pair)
            if found != expected:
                raise ValueError(f"starts have factors of shapes {found} for {whole}, expected {expected}")
        elif whole in left and (factors or tuple(start.tensors[whole].shape) != target.shape):
            raise ValueError(
                f"starts have a matrix {tuple(start.tensors[whole].shape)} for {whole}, expected "
                f"{'factors' if factors else target.shape}"
            )
        left -= {whole, *pair}
    if left:
        raise ValueError(f"starts have a matrix for {min(left)}, which is no weight of the level")
