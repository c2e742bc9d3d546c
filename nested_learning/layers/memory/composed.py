"""A memory layer from parts that are named in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.layers.registry import register_mixer
from nested_learning.memory.compose import compose_parts


@register_mixer("memory")
class ComposedMemory(MemoryLayer):
    """Any combination of architecture, objective, rule and retention that makes sense.

    For models that have no row in the table:
    `ComposedMemory(256, parts={"architecture": "swiglu", "objective": "huber", "momentum": True})`.

    Args:
        hidden_size: D, the width of the input.
        num_heads: H; head width d = D / H.
        parts: keywords of `nested_learning.memory.compose`, plain names and numbers.
        conv_size: width of the causal convolution in front of the memories, 0 for none.
        max_half_life: as in `MemoryLayer`.

    Raises:
        ValueError: as in `compose` and `MemoryLayer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        parts: Mapping[str, Any] | None = None,
        conv_size: int = 4,
        max_half_life: float | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, compose_parts(parts or {}), conv_size, max_half_life)
