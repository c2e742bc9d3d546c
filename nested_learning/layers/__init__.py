"""Layers on [B, T, D] inputs: each takes a state and returns it, `y, state = layer(x, state, mask)`."""

from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.presets import SelfModifyingTitans, Titans

__all__ = ["MemoryLayer", "SelfModifyingTitans", "Titans"]
