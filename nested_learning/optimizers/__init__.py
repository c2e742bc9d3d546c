"""Optimizers as associative memories of gradients: torch.optim classes and pure functions."""

from nested_learning.optimizers.memory_forms import (
    AdaGradMemory,
    AdamMemory,
    GDMemory,
    GradientMemory,
    MemoryOptimizer,
    MomentumMemory,
    adagrad_optimum,
    adam_optimum,
)

__all__ = [
    "AdaGradMemory",
    "AdamMemory",
    "GDMemory",
    "GradientMemory",
    "MemoryOptimizer",
    "MomentumMemory",
    "adagrad_optimum",
    "adam_optimum",
]
