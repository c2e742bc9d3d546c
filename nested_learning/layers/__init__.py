"""Layers on [B, T, D] inputs: each takes a state and returns it, `y, state = layer(x, state, mask)`."""

from nested_learning.layers.attention import Attention, SlidingWindowAttention
from nested_learning.layers.cms import CMSLevel, CMSState, ContinuumMemorySystem, MLPBlock
from nested_learning.layers.composed import ComposedMemory
from nested_learning.layers.drop_in import carry_states, replace_linears
from nested_learning.layers.low_rank_mlp import LowRankSelfModifyingMLP
from nested_learning.layers.matrix_memories import (
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    OjaNet,
    RetNet,
    TTTLinear,
)
from nested_learning.layers.memory_as_context import MemoryAsContext
from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.mlp_memories import DLA, TTTMLP, Memora, Moneta, Yaad
from nested_learning.layers.presets import SelfModifyingTitans, Titans
from nested_learning.layers.registry import MIXERS, register_mixer
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.layers.titans_blocks import MemoryAsGate, MemoryAsLayer

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
