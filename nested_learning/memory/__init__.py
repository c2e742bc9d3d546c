"""What an associative memory is: architecture, objective, rule, retention as data; its state; the scan."""

from nested_learning.memory.architecture import ARCHITECTURES, Architecture, Matrix, ResidualMLP, SwiGLU
from nested_learning.memory.compose import compose
from nested_learning.memory.description import MatrixRule, MemorySystem, learning_rule
from nested_learning.memory.objective import L2, OBJECTIVES, Dot, Huber, Lp, Objective, Oja
from nested_learning.memory.retention import Retention
from nested_learning.memory.scan import MemoryState
from nested_learning.memory.state import State

__all__ = [
    "ARCHITECTURES",
    "L2",
    "OBJECTIVES",
    "Architecture",
    "Dot",
    "Huber",
    "Lp",
    "Matrix",
    "MatrixRule",
    "MemoryState",
    "MemorySystem",
    "Objective",
    "Oja",
    "ResidualMLP",
    "Retention",
    "State",
    "SwiGLU",
    "compose",
    "learning_rule",
]
