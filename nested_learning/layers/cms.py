"""Continuum memory system: a chain of MLP blocks, each with its own update frequency (eq 70-73)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nested_learning.layers.mlp import ACTIVATIONS, MLPBlock, Weights
from nested_learning.layers.registry import unknown
from nested_learning.memory.state import State

VARIANTS = ("sequential",)
UPDATES = ("none",)
# Names of the paper that a later version brings; refusing them by name is kinder than "unknown".
_PLANNED = {"variant": ("nested", "independent"), "update": ("regression", "lm")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSLevel:
    """One level: an MLP block and how often it is updated.

    Args:
        chunk_size: tokens between two updates of the block, C of eq 71.
        expansion: hidden width of the block as a multiple of the model's width.
        intermediate_size: hidden width of the block; instead of `expansion`.
        activation: of this block, if not the system's.
    """

    chunk_size: int
    expansion: float | None = None
    intermediate_size: int | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "intermediate_size"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_count and not (value is None and name == "intermediate_size"):
                raise ValueError(f"{name} of a CMS level must be a positive integer, got {value!r}")
        if self.expansion is not None and self.intermediate_size is not None:
            raise ValueError("a CMS level takes expansion or intermediate_size, not both")
        if self.expansion is not None:
            _check_expansion("expansion of a CMS level", self.expansion)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise unknown("activation of a CMS level:", str(self.activation), ACTIVATIONS)

    def width(self, hidden_size: int, share: float) -> int:
        """Hidden width of the block; `share` · hidden_size unless the level says otherwise."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        expansion = share if self.expansion is None else self.expansion
        if round(expansion * hidden_size) < 1:
            raise ValueError(
                f"an expansion of {expansion:g} leaves the CMS level with chunk_size {self.chunk_size} no "
                f"hidden unit at hidden_size {hidden_size}; give it at least {1 / hidden_size:g}"
            )
        return round(expansion * hidden_size)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | CMSLevel) -> CMSLevel:
        """From the dict of a configuration. Raises ValueError for unknown keys or a missing chunk_size."""
        if isinstance(options, CMSLevel):
            return options
        if not isinstance(options, Mapping):
            raise ValueError(f"a CMS level is a dict such as {{'chunk_size': 512}}, got {options!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise unknown("key of a CMS level:", str(key), known)
        if "chunk_size" not in options:
            raise ValueError(f"a CMS level needs a chunk_size, got {dict(options)!r}")
        return cls(**options)


def _check_expansion(what: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r}")


def parse_levels(levels: Iterable[Mapping[str, Any] | CMSLevel]) -> list[CMSLevel]:
    """Check a list of levels, fast to slow: there is one at least, and each chunk length divides the next."""
    if isinstance(levels, (Mapping, str)) or not isinstance(levels, Iterable):
        raise ValueError(f"CMS levels are a list such as [{{'chunk_size': 512}}], got {levels!r}")
    parsed = [CMSLevel.parse(level) for level in levels]
    if not parsed:
        raise ValueError("a continuum memory system needs at least one level, such as {'chunk_size': 512}")
    sizes = [level.chunk_size for level in parsed]
    for fast, slow in itertools.pairwise(sizes):
        if slow % fast:
            raise ValueError(
                f"CMS chunk sizes are listed fast to slow and each must divide the next, got {sizes}: "
                f"{fast} does not divide {slow}"
            )
    return parsed


def check_supported(variant: str, update: str) -> None:
    """Raise ValueError for a variant or update rule that this version does not have."""
    for kind, name, supported in (("variant", variant, VARIANTS), ("update", update, UPDATES)):
        if name in supported:
            continue
        if name in _PLANNED[kind]:
            raise ValueError(
                f"CMS {kind} {name!r} is not available in this version; supported: {', '.join(supported)}"
            )
        raise unknown(f"CMS {kind}", str(name), (*supported, *_PLANNED[kind]))


class ContinuumMemorySystem(nn.Module):
    """Chain of residual MLP blocks from the fastest level to the slowest, eq 73 ("sequential").

    The paper numbers the levels one way in §3.2 and the other in §7; here the first is the fastest and
    nearest to the input. Each block normalises its input and adds its output to it, so one level is exactly
    a Transformer's feed-forward sub-layer, its residual connection included.

    With `update="none"` the blocks do not change in context: the chunk sizes say how often an optimizer with
    several frequencies steps each level and feed `info()`, they do not enter the forward pass.

    Args:
        hidden_size: width D of input and output.
        levels: fast to slow, dicts with the fields of `CMSLevel`.
        variant: "sequential".
        update: "none".
        activation: of the blocks whose level names none: "swiglu", "gelu" or "relu2".
        expansion: hidden width of all blocks together as a multiple of `hidden_size`, in equal parts, so
            that adding levels adds no parameters; a level's own `expansion` or `intermediate_size` overrides
            its part.
        norm_eps: epsilon of the RMS norms.

    Raises:
        ValueError: for unknown keys, a variant or update rule that does not exist yet, chunk sizes that are
            not positive or of which one does not divide the next, widths below one unit.
    """

    def __init__(
        self,
        hidden_size: int,
        levels: Sequence[Mapping[str, Any] | CMSLevel],
        variant: str = "sequential",
        update: str = "none",
        activation: str = "relu2",
        expansion: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_supported(variant, update)
        if activation not in ACTIVATIONS:
            raise unknown("activation", str(activation), ACTIVATIONS)
        _check_expansion("expansion", expansion)
        self.levels = parse_levels(levels)
        self.variant, self.update = variant, update
        share = expansion / len(self.levels)
        self.blocks = nn.ModuleList(
            MLPBlock(
                hidden_size,
                level.width(hidden_size, share),
                level.activation or activation,
                norm_eps,
            )
            for level in self.levels
        )

    def forward(
        self, x: Tensor, state: State | None = None, weights: Sequence[Weights | None] | None = None
    ) -> tuple[Tensor, State | None]:
        """Pass x [B, T, D] through the blocks.

        Args:
            x: [B, T, D].
            state: None; blocks without an update rule carry nothing from call to call.
            weights: per level, the weights to use instead of the block's own, see `MLPBlock.forward`.

        Returns:
            y [B, T, D] and the state (None).
        """
        if state is not None:
            raise ValueError(f"a CMS with update={self.update!r} has no state, got a {type(state).__name__}")
        if weights is not None and len(weights) != len(self.blocks):
            raise ValueError(
                f"weights must have one entry per level ({len(self.blocks)}), got {len(weights)}"
            )
        for index, block in enumerate(self.blocks):
            x = block(x, None if weights is None else weights[index])
        return x, None

    def info(self) -> list[dict[str, Any]]:
        """Per level: chunk size in tokens, updates per token (eq 71), parameters, width, activation."""
        return [
            {
                "chunk_size": level.chunk_size,
                "updates_per_token": 1 / level.chunk_size,
                "parameters": sum(p.numel() for p in block.parameters()),
                "intermediate_size": block.intermediate_size,
                "activation": block.activation,
            }
            for level, block in zip(self.levels, self.blocks, strict=True)
        ]

    def extra_repr(self) -> str:
        sizes = ", ".join(str(level.chunk_size) for level in self.levels)
        return f"variant={self.variant!r}, update={self.update!r}, chunk_sizes=[{sizes}]"
