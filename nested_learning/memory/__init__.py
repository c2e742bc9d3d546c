"""What an associative memory is: architecture, objective, rule, retention as data; its state; the scan."""

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.description import RULES, MatrixRule, MemorySystem
from nested_learning.memory.scan import MemoryState
from nested_learning.memory.state import State

__all__ = ["RULES", "MatrixRule", "MemoryState", "MemorySystem", "ResidualMLP", "State"]
