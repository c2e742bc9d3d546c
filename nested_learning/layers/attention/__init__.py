"""Softmax attention: causal, over a window, and beside a memory (MAG, MAL, MAC)."""

from nested_learning.layers.attention.heads import rotate
from nested_learning.layers.attention.mac import ContextState, MemoryAsContext
from nested_learning.layers.attention.mag_mal import MemoryAsGate, MemoryAsLayer, MemoryAttentionState
from nested_learning.layers.attention.persistent import PersistentWindowAttention
from nested_learning.layers.attention.softmax import Attention, AttentionState, SlidingWindowAttention

__all__ = [
    "Attention",
    "AttentionState",
    "ContextState",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryAttentionState",
    "PersistentWindowAttention",
    "SlidingWindowAttention",
    "rotate",
]
