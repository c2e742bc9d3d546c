"""The one memory layer, and the table of its rows: what is fixed in each, and what may be chosen."""

from nested_learning.layers.memory.composed import ComposedMemory
from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.layers.memory.row import MemoryRow
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
from nested_learning.layers.memory.self_modifying import SelfModifyingTitans
from nested_learning.layers.memory.switches import set_compile_step, set_recompute

__all__ = [
    "DLA",
    "TTTMLP",
    "ComposedMemory",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Memora",
    "MemoryLayer",
    "MemoryRow",
    "Moneta",
    "OjaNet",
    "RetNet",
    "SelfModifyingTitans",
    "TTTLinear",
    "Titans",
    "Yaad",
    "set_compile_step",
    "set_recompute",
]
