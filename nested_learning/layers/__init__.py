"""Layers on [B, T, D] inputs: each takes a state and returns it, `y, state = layer(x, state, mask)`."""

from nested_learning.layers.attention import (
    Attention,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    SlidingWindowAttention,
)
from nested_learning.layers.cms import CMSLevel, CMSState, ContinuumMemorySystem, MLPBlock
from nested_learning.layers.drop_in import (
    LowRankSelfModifyingMLP,
    SelfModifyingLinear,
    carry_states,
    replace_linears,
)
from nested_learning.layers.memory import (
    ComposedMemory,
    MemoryLayer,
    MemoryRow,
    SelfModifyingTitans,
    set_compile_step,
    set_recompute,
)
from nested_learning.layers.memory.rows import (
    DLA,
    TTTMLP,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    Memora,
    Moneta,
    OjaNet,
    RetNet,
    Titans,
    TTTLinear,
    Yaad,
)
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
    "MemoryRow",
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
    "set_compile_step",
    "set_recompute",
]
