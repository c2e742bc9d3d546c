"""Whole chunks of the most used memories as one autograd function each, for speed.

The generic step (scan.py) stays the definition: a fused run covers the training case alone, whole chunks from
a boundary on, and gives the same numbers.
"""

from nested_learning.memory.fused import self_modifying, titans
from nested_learning.memory.fused.function import apply

__all__ = ["apply", "self_modifying", "titans"]
