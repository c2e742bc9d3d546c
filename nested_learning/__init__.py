"""Nested Learning in PyTorch: Hope, self-modifying Titans and the continuum memory system.

Importing the package registers "hope" with transformers' Auto classes.
"""

from nested_learning import _moved
from nested_learning._version import __version__
from nested_learning.layers import Attention, ContinuumMemorySystem, SelfModifyingTitans, Titans
from nested_learning.models import PRESETS, HopeCache, HopeConfig, HopeForCausalLM, HopeModel, preset

_moved.install()

__all__ = [
    "PRESETS",
    "Attention",
    "ContinuumMemorySystem",
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeModel",
    "SelfModifyingTitans",
    "Titans",
    "__version__",
    "preset",
]
