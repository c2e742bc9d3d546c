"""A level: how often it learns, how, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nested_learning.continual.rules import resolve_rule, rule_name
from nested_learning.optimizers.checks import COUNT, NON_NEGATIVE, POSITIVE, Bound
from nested_learning.optimizers.memory_forms import GradientMemory

SHARE = Bound(high=1.0)
CHUNK = Bound(low=2, integer=True)
TIMES = Bound(integer=True)
LATER = frozenset({"reread", "distill", "anchor_kl"})  # options that memory files did not always know


@dataclass(frozen=True)
class Level:
    """One level of a pretrained model: a delta on chosen weights, written once every `chunk_size` tokens.

    At its boundary, when the token counter is a multiple of `chunk_size`, the level writes (eq 71)

        Δ ← (1 − decay) Δ − lr · rule(clip(G)),   G = Σ ∇_W of the next-token loss,

    the sum (not the mean) over the chunk_size − 1 pairs of neighbouring tokens wholly inside the chunk, or
    over those of them whose second token `observe` was told to learn.

    Args:
        chunk_size: tokens between two writes, at least 2.
        lr: η. With 0 the level never learns from text (it may still take over from a faster one).
        layers: "all", "last third" (rounded up), or indices of the model's layers; negative ones count
            from the end.
        rule: "gd", "momentum", "adam", "m3", or a memory form of `nested_learning.optimizers` (an object
            with init, update and read), such as `MomentumMemory(0.95)`. "sgd" is "gd".
        clip: largest Frobenius norm of G, over all weights of the level together; None for no bound.
        rank: the delta is a product of two factors of this rank, both learned, instead of a full matrix.
        gate: write only when the mean loss of the chunk exceeds this many nats per token.
        gate_quantile: write only when the mean loss of the chunk exceeds this quantile of the (at most 64)
            chunks before; the first chunk is always written.
        consolidate: share of the next faster level's delta that this level takes over at its boundary, on
            the weights both have: Δ_slow += r·Δ_fast, Δ_fast −= r·Δ_fast. What the model computes does not
            change by it. Needs `rank=None`.
        decay: share of the delta that is forgotten at every write: an anchor at the pretrained weights.
            With `stack_levels(fisher=…)` each weight has a share of its own.
        reread: how often the level goes over its chunk again after it was written, each time at the weights
            then in force, and writes again; see `continual.again`.
        distill: λ. When a window closes, G gets λ times the gradient of the divergence from what the model
            predicted with that window before it to what it predicts without; see `continual.distil`.
        anchor_kl: μ. At the boundary, G gets μ times the gradient of the divergence from the base model's
            predictions of background text (`stack_levels(background=…)`); see `continual.anchor_kl`.

    Raises:
        ValueError: a value is out of its range, or two exclude each other.
    """

    chunk_size: int
    lr: float
    layers: str | Sequence[int] = "all"
    rule: str | GradientMemory = "gd"
    clip: float | None = 1.0
    rank: int | None = None
    gate: float | None = None
    gate_quantile: float | None = None
    consolidate: float = 0.0
    decay: float = 0.0
    reread: int = 0
    distill: float = 0.0
    anchor_kl: float = 0.0

    def __post_init__(self) -> None:
        CHUNK.check("chunk_size", self.chunk_size)
        NON_NEGATIVE.check("lr", self.lr)
        SHARE.check("consolidate", self.consolidate)
        SHARE.check("decay", self.decay)
        TIMES.check("reread", self.reread)
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
        if self.consolidate and self.rank is not None:
            raise ValueError(
                f"a level of rank {self.rank} cannot take over another level's delta exactly; "
                "set rank=None on the level that consolidates"
            )
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.rule, str):
            object.__setattr__(self, "rule", rule_name(self.rule))
        resolve_rule(self.rule)

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
            name: getattr(self, name)
            for name, option in self.__dataclass_fields__.items()
            if name not in LATER or getattr(self, name) != option.default
        }
        rule = self.rule if isinstance(self.rule, str) else repr(self.rule)
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {**values, "rule": rule, "layers": layers}


def check_levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels, fast to slow.

    Raises:
        ValueError: none, not Levels, chunk sizes that do not increase, or a fastest level that
            consolidates.
    """
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
    return levels
