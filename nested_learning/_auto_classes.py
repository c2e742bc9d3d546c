"""The import hook by which transformers' Auto classes know "hope" though transformers is not imported here.

Hope's classes derive from transformers' classes, so they cannot be registered before transformers is
imported, which takes seconds. Where the Auto classes are loaded already, they are told at once; else a finder
on `sys.meta_path` waits for them. It changes nothing about what is found and how: it only counts, per thread,
the modules of transformers and of this package whose code is running. When the outermost one has ended and
the Auto classes are among what was loaded, the finder takes itself away and imports
`nested_learning.models.hope`, which registers its classes. Before that end it could meet modules that are
only half there: transformers loads the Auto classes in the middle of others. (So a second thread that uses
the Auto classes while the first one is still importing what loaded them may look before "hope" is there;
import them once before starting threads.)
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_MODULES = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
)
REGISTERS = "nested_learning.models.hope"  # importing it registers its classes
_WATCHED = ("transformers", "nested_learning")


class AutoClassesFinder(MetaPathFinder):
    """Finds modules as the finders after it do, and counts those of `_WATCHED` that are running."""

    def __init__(self) -> None:
        self._here = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in _WATCHED:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _CountedLoader(self, spec.loader)
                return spec
        return None

    def run(self, loader: Any, module: ModuleType) -> None:
        """Run a module's code; after the outermost one, register if the Auto classes are loaded."""
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._here.depth = depth
        if depth == 0 and self in sys.meta_path and auto_classes_are_loaded():
            sys.meta_path.remove(self)
            importlib.import_module(REGISTERS)


class _CountedLoader(Loader):
    """A loader that runs its module through the finder, once; the module keeps the loader it would have."""

    def __init__(self, finder: AutoClassesFinder, loader: Any) -> None:
        self._finder = finder
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._finder.run(self._loader, module)


def auto_classes_are_loaded() -> bool:
    """Whether transformers' AutoConfig or its models' Auto classes have been imported."""
    return any(name in sys.modules for name in AUTO_MODULES)


def install() -> None:
    """Register Hope with the Auto classes: at once if they are loaded, else when they are."""
    if auto_classes_are_loaded():
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, AutoClassesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoClassesFinder())
