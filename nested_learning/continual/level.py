"""A level: how often it learns, how, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from nested_learning.continual.rules import acts_by_row, resolve_rule, rule_name
from nested_learning.optimizers.checks import COUNT, NON_NEGATIVE, POSITIVE, Bound
from nested_learning.optimizers.memory_forms import GradientMemory

SHARE = Bound(high=1.0)
PART = Bound(high=1.0, open_low=True)
CHUNK = Bound(low=2, integer=True)
INDEX = Bound(integer=True)
# Settings that describe every level in a memory file, also one from before there were others.
DESCRIBED_ALWAYS = frozenset(
    ("chunk_size", "lr", "layers", "rule", "clip", "rank", "gate", "gate_quantile", "consolidate", "decay")
)


@dataclass(frozen=True)
class Level:
    """One level of a pretrained model: a delta on chosen weights, written once every `chunk_size` tokens.

    At its boundary, when the token counter is a multiple of `chunk_size`, the level writes (eq 71)

        Δ ← (1 − decay) Δ − lr · rule(clip(G)),   G = Σ ∇_W of the next-token loss,

    the sum (not the mean) over the chunk_size − 1 pairs of neighbouring tokens wholly inside the chunk, or
    over those of them whose second token `observe` was told to learn. A level with `average_of` is the moving
    average of a faster level instead, and answers in its place.

    Args:
        chunk_size: tokens between two writes, at least 2.
        lr: η. With 0 the level never learns from text (it may still take over from a faster one). Left out
            for an average.
        layers: "all", "last third" (rounded up), or indices of the model's layers; negative ones count
            from the end.
        rule: "gd", "momentum", "adam", "rms" (the gradient by the root of its running mean square, which is
            Adam with β = (0, 0.99); measured with `clip=None`), "m3", or a memory form of
            `nested_learning.optimizers` (an object with init, update and read), such as
            `MomentumMemory(0.95)`. "sgd" is "gd".
        clip: largest Frobenius norm of G, over all weights of the level together; None for no bound.
        rank: the delta is a product of two factors of this rank, both learned, instead of a full matrix.
        gate: write only when the mean loss of the chunk exceeds this many nats per token.
        gate_quantile: write only when the mean loss of the chunk exceeds this quantile of the (at most 64)
            chunks before; the first chunk is always written.
        consolidate: share of the next faster level's delta that this level takes over at its boundary, on
            the weights both have: Δ_slow += r·Δ_fast, Δ_fast −= r·Δ_fast. What the model computes does not
            change by it. With `rank` (and lr=0; the faster level needs a rank too) Δ_slow becomes the best
            approximation of its rank, and what the model computes changes by what that could not hold,
            which `Write.truncation` says.
        decay: share of the delta that is forgotten at every write: an anchor at the pretrained weights.
            With `stack_levels(fisher=…)` each weight has a share of its own.
        average_of: index of a faster level, 0 is the fastest. At its boundary the level moves towards that
            one, A ← A + rate · (Δ − A), on the weights both have. It is not in force while text is read, so
            the other levels learn as they would without it; answers have it in the place of the level that
            it averages. Its chunks must end where that level has just written. It has the form of that
            level: full, sparse or of its rank, or, with `rank`, of another rank.
        rate: share of the way that an average moves, above 0, at most 1.
        learn_down: whether both factors of a low-rank delta learn. False: `down` stays as drawn and `up`
            alone learns, which an average of the level follows exactly.
        sparse: share of the hidden units of each MLP that one write changes, above 0, at most 1: those whose
            gradient stands out against what it usually is (`units.SparseWrites`). A unit is its row of the
            matrices into the hidden layer and its column of the one out of it. Clip and decay act on what is
            written, deltas and the rule's state are kept for units that were ever written, and a unit's state
            counts its own writes alone. None: all weights.
        reread: how often the level goes over its chunk again after it was written, each time at the weights
            then in force, and writes again; see `objectives.again`.
        distill: λ. When a window closes, G gets λ times the gradient of the divergence from what the model
            predicted with that window before it to what it predicts without; see `objectives.distil`.
        anchor_kl: μ. At the boundary, G gets μ times the gradient of the divergence from the base model's
            predictions of background text (`stack_levels(background=…)`); see `objectives.anchor_kl`.

    Raises:
        ValueError: a value is out of its range, or two exclude each other.
    """

    chunk_size: int
    lr: float = None  # type: ignore[assignment]  # becomes 0 for an average; every other level has to say it
    layers: str | Sequence[int] = "all"
    rule: str | GradientMemory = "gd"
    clip: float | None = 1.0
    rank: int | None = None
    gate: float | None = None
    gate_quantile: float | None = None
    consolidate: float = 0.0
    decay: float = 0.0
    average_of: int | None = None
    rate: float | None = None
    learn_down: bool = True
    sparse: float | None = None
    reread: int = 0
    distill: float = 0.0
    anchor_kl: float = 0.0

    def __post_init__(self) -> None:
        CHUNK.check("chunk_size", self.chunk_size)
        if self.lr is None:
            if self.average_of is None:
                raise ValueError(
                    "lr is missing: give a learning rate, such as lr=0.1, or, for the average of a faster "
                    "level, average_of and rate"
                )
            object.__setattr__(self, "lr", 0.0)
        NON_NEGATIVE.check("lr", self.lr)
        SHARE.check("consolidate", self.consolidate)
        SHARE.check("decay", self.decay)
        INDEX.check("reread", self.reread)
        NON_NEGATIVE.check("distill", self.distill)
        NON_NEGATIVE.check("anchor_kl", self.anchor_kl)
        self._check_that_it_learns("reread", "distill", "anchor_kl")
        for name, bound in (
            ("clip", POSITIVE),
            ("rank", COUNT),
            ("gate", NON_NEGATIVE),
            ("gate_quantile", SHARE),
        ):
            value = getattr(self, name)
            if value is not None:
                bound.check(name, value)
        if self.gate is not None and self.gate_quantile is not None:
            raise ValueError(
                f"gate is {self.gate} and gate_quantile is {self.gate_quantile}; expected one of them: "
                "a fixed threshold or a running one"
            )
        if self.consolidate and self.rank is not None and (self.lr or not self.learn_down):
            raise ValueError(
                f"a level of rank {self.rank} that takes over another level's delta has its factors "
                f"made anew each time, so neither learns from text: set lr=0 (it is {self.lr}) and leave "
                "learn_down out, or set rank=None"
            )
        if not isinstance(self.layers, str):
            if not isinstance(self.layers, Iterable):
                raise ValueError(
                    f"layers must be 'all', 'last third' or a list of indices, got {self.layers!r}"
                )
            own = (int(i) if isinstance(i, np.integer) else i for i in self.layers)
            object.__setattr__(self, "layers", tuple(own))
        if not isinstance(self.learn_down, bool):
            raise ValueError(f"learn_down must be True or False, got {self.learn_down!r}")
        if isinstance(self.rule, str):
            object.__setattr__(self, "rule", rule_name(self.rule))
        resolve_rule(self.rule)
        self._check_average()
        self._check_sparse()
        if not self.learn_down and self.rank is None:
            raise ValueError(
                "learn_down=False is for the two factors of a low-rank delta: give the level a rank, "
                "or leave it out"
            )

    def _check_sparse(self) -> None:
        if self.sparse is None:
            return
        PART.check("sparse", self.sparse)
        for name, unused in (("rank", None), ("consolidate", 0.0), ("average_of", None)):
            if (value := getattr(self, name)) != unused:
                raise ValueError(
                    f"sparse is {self.sparse} and {name} is {value}; expected one of them: a sparse level "
                    "keeps rows of full matrices, of those units that its own gradients choose"
                )
        if not acts_by_row(resolve_rule(self.rule)):
            raise ValueError(
                f"rule is {self.rule!r}, which writes a matrix as a whole; a sparse level needs a rule that "
                "acts on each hidden unit alone, such as 'gd', 'momentum' or 'adam'"
            )

    def _check_average(self) -> None:
        if self.average_of is None:
            if self.rate is not None:
                raise ValueError(
                    f"rate is {self.rate}, but there is nothing to average: name a faster level by "
                    "average_of, or give the learning rate as lr"
                )
            return
        INDEX.check("average_of", self.average_of)
        if self.rate is None:
            raise ValueError(f"average_of is {self.average_of}: expected a rate too, such as rate=0.1")
        PART.check("rate", self.rate)
        unused = {"lr": 0.0, "rule": "gd", "clip": 1.0, "consolidate": 0.0, "decay": 0.0, "learn_down": True}
        for name, default in unused.items():
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name} is {value!r}, but a level with average_of learns from no text and takes over "
                    f"nothing else: leave {name} out"
                )

    def _check_that_it_learns(self, *options: str) -> None:
        for name in options:
            if getattr(self, name) and not self.lr:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but with lr=0 the level learns nothing: give it a "
                    f"rate, or leave {name} out"
                )

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The chosen layers of a model with `num_layers`, ascending.

        Raises:
            ValueError: an unknown name, an index out of range or twice, or none at all.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "last third":
            return tuple(range(num_layers - -(-num_layers // 3), num_layers))
        if isinstance(self.layers, str):
            raise ValueError(f"layers must be 'all', 'last third' or a list of indices, got {self.layers!r}")
        for index in self.layers:
            if isinstance(index, bool) or not isinstance(index, int) or not -num_layers <= index < num_layers:
                raise ValueError(f"layers names {index!r}, but the model has layers 0 to {num_layers - 1}")
        chosen = sorted({index % num_layers for index in self.layers})
        if len(chosen) != len(self.layers) or not chosen:
            raise ValueError(f"layers must name at least one layer and none twice, got {list(self.layers)}")
        return tuple(chosen)

    def describe(self) -> dict[str, Any]:
        """All settings as JSON values; equal for levels that learn alike.

        Options that memory files did not always know are left out where they are off.
        """
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in DESCRIBED_ALWAYS or getattr(self, field.name) != field.default
        }
        rule = self.rule if isinstance(self.rule, str) else repr(self.rule)
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {**values, "rule": rule, "layers": layers}


def check_levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels, fast to slow; an average has the rank of the level that it averages, unless it has its own.

    Raises:
        ValueError: none, not Levels, chunk sizes that do not increase, a fastest level that consolidates, one
            at a rank that does so from a full one, or an average of what cannot be averaged.
    """
    if not isinstance(levels, Iterable):
        raise ValueError(f"levels must be a list of at least one Level, got {levels!r}")
    levels = tuple(levels)
    wrong = [level for level in levels if not isinstance(level, Level)]
    if wrong or not levels:
        raise ValueError(f"levels must be a list of at least one Level, got {wrong or list(levels)!r}")
    sizes = [level.chunk_size for level in levels]
    if any(slow <= fast for fast, slow in pairwise(sizes)):
        raise ValueError(
            f"chunk sizes must increase from level to level, fast to slow, got {sizes}. "
            f"Did you mean {sorted(set(sizes))}?"
        )
    if levels[0].consolidate:
        raise ValueError("the fastest level has no faster one to take over from: leave out its `consolidate`")
    faster = levels[0]
    for index, level in enumerate(levels):
        if level.consolidate and level.rank is not None and faster.rank is None:
            raise ValueError(
                f"level {index} has rank {level.rank}, but the level that it takes over from "
                f"(consolidate={level.consolidate}) has none: leave the rank out, or give both levels one"
            )
        faster = faster if level.average_of is not None else level
    return tuple(
        level if level.average_of is None else _averaging(levels, index, level)
        for index, level in enumerate(levels)
    )


def without_layers(settings: Any) -> Any:
    """Settings of levels, as `describe` has them, with no layers: weights tell these, [-1] is [29] of thirty.

    What is no list of settings stays as it is.
    """
    if not isinstance(settings, list):
        return settings
    return [{**each, "layers": None} if isinstance(each, dict) else each for each in settings]


def _averaging(levels: Sequence[Level], index: int, level: Level) -> Level:
    """Level `index`, an average, with the form of the level that it averages."""
    assert level.average_of is not None
    if level.average_of >= index:
        none = "" if index else ": the fastest level has no faster one, so leave average_of out"
        raise ValueError(
            f"level {index} has average_of={level.average_of}; expected the index of a faster level, "
            f"from 0 to {index - 1}{none}"
        )
    averaged = levels[level.average_of]
    if averaged.average_of is not None:
        raise ValueError(
            f"level {index} has average_of={level.average_of}, which is an average itself; expected a level "
            f"that learns. Did you mean average_of={averaged.average_of}?"
        )
    if level.chunk_size % averaged.chunk_size:
        raise ValueError(
            f"level {index} averages level {level.average_of} every {level.chunk_size} tokens, expected a "
            f"multiple of that one's chunk of {averaged.chunk_size}: an average is taken where the level has "
            "just written"
        )
    if level.rank is not None and averaged.rank is None:
        raise ValueError(
            f"level {index} has rank {level.rank}, but level {level.average_of}, which it averages, has "
            "none: leave the rank out, or give both levels one"
        )
    return level if level.rank is not None else replace(level, rank=averaged.rank)
