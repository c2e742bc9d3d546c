"""Modules that have moved are found under their old names, with a warning."""

from __future__ import annotations

import importlib
import sys

import pytest

from nested_learning._moved import MOVED

# A public name of each old module that users may have taken from there.
NAMES = {
    "layers.cms_level": "CMSLevel",
    "layers.composed": "ComposedMemory",
    "layers.low_rank_mlp": "LowRankMLPState",
    "layers.matrix_memories": "DeltaNet",
    "layers.memory_as_context": "MemoryAsContext",
    "layers.memory_layer": "set_recompute",
    "layers.mlp": "MLPBlock",
    "layers.mlp_memories": "Yaad",
    "layers.presets": "Titans",
    "layers.self_modifying_linear": "SelfModifyingLinearState",
    "layers.titans_blocks": "MemoryAsGate",
    "memory.description": "MemorySystem",
    "memory.scan": "MemoryState",
    "ops.conv": "causal_conv",
}


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_warns_and_works(old):
    sys.modules.pop(f"nested_learning.{old}", None)
    with pytest.warns(
        DeprecationWarning, match=f"nested_learning.{old} has moved to nested_learning.{MOVED[old]}"
    ):
        module = importlib.import_module(f"nested_learning.{old}")
    if old in NAMES:
        new = importlib.import_module(f"nested_learning.{MOVED[old]}")
        assert getattr(module, NAMES[old]) is getattr(new, NAMES[old])


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nested_learning.layers.memory_layers")
