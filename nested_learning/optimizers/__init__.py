"""Optimizers as associative memories of gradients: torch.optim classes and pure functions."""

from nested_learning.optimizers.build import build
from nested_learning.optimizers.deep_momentum import DeepMomentumGD
from nested_learning.optimizers.delta_gd import DeltaGD
from nested_learning.optimizers.matrix import M3, OrthogonalMomentum
from nested_learning.optimizers.memory_forms import (
    AdaGradMemory,
    AdamMemory,
    GDMemory,
    GradientMemory,
    MemoryOptimizer,
    MomentumMemory,
    PreconditionedMomentumMemory,
    adagrad_optimum,
    adam_optimum,
)
from nested_learning.optimizers.momentum import DeltaMomentum, FeatureMomentum, PreconditionedMomentum
from nested_learning.optimizers.multi_frequency import MultiFrequency
from nested_learning.optimizers.nested import NestedOptimizer

__all__ = [
    "M3",
    "AdaGradMemory",
    "AdamMemory",
    "DeepMomentumGD",
    "DeltaGD",
    "DeltaMomentum",
    "FeatureMomentum",
    "GDMemory",
    "GradientMemory",
    "MemoryOptimizer",
    "MomentumMemory",
    "MultiFrequency",
    "NestedOptimizer",
    "OrthogonalMomentum",
    "PreconditionedMomentum",
    "PreconditionedMomentumMemory",
    "adagrad_optimum",
    "adam_optimum",
    "build",
]
