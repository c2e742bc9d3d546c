"""Architectures of a memory: the map it is, and the gradients that one inner step asks of its matrices."""

from nested_learning.memory.architecture.base import Architecture, Down, Linear, Trace
from nested_learning.memory.architecture.matrix import Matrix
from nested_learning.memory.architecture.mlp import ResidualMLP, SwiGLU

ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in (Matrix, ResidualMLP, SwiGLU)}

__all__ = ["ARCHITECTURES", "Architecture", "Down", "Linear", "Matrix", "ResidualMLP", "SwiGLU", "Trace"]
