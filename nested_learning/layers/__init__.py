"""Layers on [B, T, D] inputs: each takes a state and returns it, `y, state = layer(x, state, mask)`."""

from nested_learning.layers.attention import Attention, SlidingWindowAttention
from nested_learning.layers.cms import CMSLevel, ContinuumMemorySystem
from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.mlp import MLPBlock
from nested_learning.layers.presets import SelfModifyingTitans, Titans
from nested_learning.layers.registry import MIXERS, register_mixer

__all__ = [
    "MIXERS",
    "Attention",
    "CMSLevel",
    "ContinuumMemorySystem",
    "MLPBlock",
    "MemoryLayer",
    "SelfModifyingTitans",
    "SlidingWindowAttention",
    "Titans",
    "register_mixer",
]
