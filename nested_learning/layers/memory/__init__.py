"""The one memory layer, and the table of its rows: what is fixed in each, and what may be chosen."""

from nested_learning.layers.memory.composed import ComposedMemory
from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.layers.memory.row import MemoryRow
from nested_learning.layers.memory.self_modifying import SelfModifyingTitans
from nested_learning.layers.memory.switches import set_compile_step, set_recompute

__all__ = [
    "ComposedMemory",
    "MemoryLayer",
    "MemoryRow",
    "SelfModifyingTitans",
    "set_compile_step",
    "set_recompute",
]
