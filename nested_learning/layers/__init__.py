"""Layers on [B, T, D] inputs: each takes a state and returns it, `y, state = layer(x, state, mask)`."""

from nested_learning.layers.attention import (
    Attention,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    SlidingWindowAttention,
)
from nested_learning.layers.cms import CMSLevel, CMSState, ContinuumMemorySystem
from nested_learning.layers.composed import ComposedMemory
from nested_learning.layers.drop_in import (
    LowRankSelfModifyingMLP,
    SelfModifyingLinear,
    carry_states,
    replace_linears,
)
from nested_learning.layers.matrix_memories import (
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    OjaNet,
    RetNet,
    TTTLinear,
)
from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.mlp import MLPBlock
from nested_learning.layers.mlp_memories import DLA, TTTMLP, Memora, Moneta, Yaad
from nested_learning.layers.presets import SelfModifyingTitans, Titans
from nested_learning.layers.registry import MIXERS, register_mixer

__all__ = [
    "DLA",
    "MIXERS",
    "TTTMLP",
    "Attention",
    "CMSLevel",
    "CMSState",
    "ComposedMemory",
    "ContinuumMemorySystem",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "LowRankSelfModifyingMLP",
    "MLPBlock",
    "Memora",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryLayer",
    "Moneta",
    "OjaNet",
    "RetNet",
    "SelfModifyingLinear",
    "SelfModifyingTitans",
    "SlidingWindowAttention",
    "TTTLinear",
    "Titans",
    "Yaad",
    "carry_states",
    "register_mixer",
    "replace_linears",
]
