"""The nested-learning view: any model with any optimizer as memories, each with its update frequency.

print(levels(model, optimizer))
"""

from nested_learning.levels import layers as _layers  # noqa: F401  registers their descriptions
from nested_learning.levels.build import levels
from nested_learning.levels.registry import (
    GradientMemory,
    Memory,
    OptimizerRule,
    Weights,
    describes,
    describes_optimizer,
)
from nested_learning.levels.system import (
    INFINITE,
    NEVER,
    Component,
    Frequency,
    Level,
    NestedSystem,
    Transfer,
    every_steps,
    every_tokens,
)

__all__ = [
    "INFINITE",
    "NEVER",
    "Component",
    "Frequency",
    "GradientMemory",
    "Level",
    "Memory",
    "NestedSystem",
    "OptimizerRule",
    "Transfer",
    "Weights",
    "describes",
    "describes_optimizer",
    "every_steps",
    "every_tokens",
    "levels",
]
