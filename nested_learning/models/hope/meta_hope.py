"""Layers built without memory, to see whether a configuration describes any: once for the same values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class _Buildable:
    """What can be built; two are the same if they build the same from values that are written the same."""

    build: Callable[..., nn.Module]
    written: str
    values: Mapping[str, Any] = field(compare=False)


def built_on_meta(build: Callable[..., nn.Module], **values: Any) -> nn.Module:
    """The module `build(**values)` on the meta device; of the last ones each is built once.

    A configuration is checked when it is made and for each part of the model that is built from it, and to
    build the layers, which is the check, takes longer than all the rest. Nothing is kept where a value is not
    as in JSON, since what it is could change and its text not; an error is raised anew each time.
    """
    try:
        json.dumps(values)
    except (TypeError, ValueError, RecursionError):
        return _built(_Buildable(build, "", values))
    return _kept(_Buildable(build, repr(values), values))


def _built(one: _Buildable) -> nn.Module:
    with torch.device("meta"):
        return one.build(**one.values)


_kept = lru_cache(maxsize=64)(_built)
