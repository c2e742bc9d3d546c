"""Models for transformers."""

from nested_learning.models.hope import (
    HopeCache,
    HopeConfig,
    HopeForCausalLM,
    HopeLayer,
    HopeLayerState,
    HopeModel,
)
from nested_learning.models.packaged import Pretrained, pretrained
from nested_learning.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeLayer",
    "HopeLayerState",
    "HopeModel",
    "Pretrained",
    "preset",
    "pretrained",
]
