"""Hope's classes for `trust_remote_code=True`, from the installed package.

`save_pretrained` writes this file beside a model, so that transformers can load it in a process that has not
imported the package. There is no code of the model in it.
"""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

_INSTALL = (
    "Install the distribution nested-learning-torch, which has it (pip install nested-learning-torch): "
    "the distribution nested-learning on the package index is another project's"
)


def _models() -> ModuleType:
    """The package's models. Nothing of a package is run that does not have this very file.

    There is no import statement for them: transformers looks for those, and tells users who lack the package
    to install what on the package index is another project's.
    """
    spec = importlib.util.find_spec("nested_learning")
    if spec is None:
        raise ImportError(f"this model needs the package nested_learning, which is not there. {_INSTALL}.")
    places = list(spec.submodule_search_locations or [])
    here = os.path.join("models", "hope", "nested_learning_hope.py")
    if not any(os.path.isfile(os.path.join(place, here)) for place in places):
        raise ImportError(
            f"the package nested_learning in {spec.origin or places} cannot load this model: it belongs to "
            f"another project, or is an early version. Uninstall it. {_INSTALL}."
        )
    return importlib.import_module("nested_learning.models.hope")


_MODELS = _models()


def __getattr__(name: str) -> Any:
    return getattr(_MODELS, name)
