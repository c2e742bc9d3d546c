"""Associative memories: architecture, objective, rule and retention as data, their state, what runs them."""

from nested_learning.memory.architecture import ARCHITECTURES, Architecture, Matrix, ResidualMLP, SwiGLU
from nested_learning.memory.compose import compose
from nested_learning.memory.objective import L2, OBJECTIVES, Dot, Huber, Lp, Objective, Oja
from nested_learning.memory.retention import Retention
from nested_learning.memory.running import MemoryState
from nested_learning.memory.state import State, Weights
from nested_learning.memory.system import MatrixRule, MemorySystem, learning_rule

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
    "Weights",
    "compose",
    "learning_rule",
]
