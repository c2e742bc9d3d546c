"""The nested-learning view: any model with any optimizer as memories, each with its update frequency.

print(levels(model, optimizer))
"""

import warnings

from nested_learning.levels.build import levels
from nested_learning.levels.components import (
    INFINITE,
    NEVER,
    Component,
    DescribedLevel,
    Frequency,
    Transfer,
    every_steps,
    every_tokens,
)
from nested_learning.levels.describe import layers as _layers  # noqa: F401  registers their descriptions
from nested_learning.levels.describe.registry import (
    DescribedGradientMemory,
    DescribedMemory,
    DescribedWeights,
    OptimizerRule,
    describes,
    describes_optimizer,
)
from nested_learning.levels.system import NestedSystem

__all__ = [
    "INFINITE",
    "NEVER",
    "Component",
    "DescribedGradientMemory",
    "DescribedLevel",
    "DescribedMemory",
    "DescribedWeights",
    "Frequency",
    "NestedSystem",
    "OptimizerRule",
    "Transfer",
    "describes",
    "describes_optimizer",
    "every_steps",
    "every_tokens",
    "levels",
]

_RENAMED = {
    "GradientMemory": DescribedGradientMemory,
    "Level": DescribedLevel,
    "Memory": DescribedMemory,
    "Weights": DescribedWeights,
}


def __getattr__(name: str) -> type:
    """A describing class by its deprecated name, with a warning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"nested_learning.levels.{name} is deprecated, use {new.__name__}", DeprecationWarning, stacklevel=2
    )
    return new
