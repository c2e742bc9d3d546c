"""Nested Learning in PyTorch: Hope, self-modifying Titans and the continuum memory system.

Importing the package is quick: torch and transformers are imported with the first name that needs them.
transformers' Auto classes know "hope" from then on, whichever of the two is imported first; see
`nested_learning._auto_classes`.
"""

from typing import TYPE_CHECKING

from nested_learning import _auto_classes, _moved
from nested_learning._lazy import names_on_first_use
from nested_learning._version import __version__

if TYPE_CHECKING:
    from nested_learning._progress import quiet
    from nested_learning.layers import Attention, ContinuumMemorySystem, SelfModifyingTitans, Titans
    from nested_learning.models import (
        PRESETS,
        HopeCache,
        HopeConfig,
        HopeForCausalLM,
        HopeLayer,
        HopeLayerState,
        HopeModel,
        preset,
        pretrained,
    )
else:
    _LAYERS = ("Attention", "ContinuumMemorySystem", "SelfModifyingTitans", "Titans")
    _MODELS = (
        "PRESETS",
        "HopeCache",
        "HopeConfig",
        "HopeForCausalLM",
        "HopeLayer",
        "HopeLayerState",
        "HopeModel",
        "preset",
        "pretrained",
    )
    _FOLDERS = ("continual", "layers", "lens", "levels", "memory", "models", "ops", "optimizers", "training")
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            **dict.fromkeys(_LAYERS, "nested_learning.layers"),
            **dict.fromkeys(_MODELS, "nested_learning.models"),
            "quiet": "nested_learning._progress",
            **{name: f"nested_learning.{name}" for name in _FOLDERS},
        },
    )

_moved.install()
_auto_classes.install()

__all__ = [
    "PRESETS",
    "Attention",
    "ContinuumMemorySystem",
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeLayer",
    "HopeLayerState",
    "HopeModel",
    "SelfModifyingTitans",
    "Titans",
    "__version__",
    "preset",
    "pretrained",
    "quiet",
]
