"""Modules that have moved: their old names work, with a DeprecationWarning that says the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "nested_learning"
# Old and new names, without the package's.
MOVED = {
    "layers.cms_level": "layers.cms.level",
    "layers.cms_nested": "layers.cms.nested",
    "layers.cms_regression": "layers.cms.regression",
    "layers.cms_segments": "layers.cms.segments",
    "layers.cms_writing": "layers.cms.writer",
    "layers.composed": "layers.memory.composed",
    "layers.low_rank_mlp": "layers.drop_in.low_rank_mlp",
    "layers.matrix_memories": "layers.memory.rows",
    "layers.memory_as_context": "layers.attention.mac",
    "layers.memory_layer": "layers.memory",
    "layers.mlp": "layers.cms.block",
    "layers.mlp_memories": "layers.memory.rows",
    "layers.persistent": "layers.attention.persistent",
    "layers.presets": "layers",
    "layers.self_modifying_linear": "layers.drop_in.self_modifying_linear",
    "layers.titans_blocks": "layers.attention.mag_mal",
    "levels.registry": "levels.describe.registry",
    "memory.description": "memory.system",
    "memory.scan": "memory.running",
    "ops.conv": "ops.heads",
    "ops.gated_norm": "ops.heads",
    "ops.precision": "ops.context",
    "ops.short_conv": "ops.heads",
}


class _Finder(MetaPathFinder, Loader):
    """Finds the old names; asked last, after the modules that exist."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and rest in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"{_PACKAGE}.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} has moved to {new}", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


def install() -> None:
    """Let the old names be found, once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
