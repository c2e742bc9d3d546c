"""Mixers by name: what `HopeConfig(mixer=...)` accepts.

A mixer is an nn.Module with `forward(x, state=None, mask=None, **) -> (y, state)` on [B, T, D]. Its
factory takes the width and the number of heads of the model and the mixer's own options as keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nested_learning._errors import unknown

MIXERS: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Class decorator: make a layer available as `mixer=name`."""

    def add(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in MIXERS:
            raise ValueError(f"mixer {name!r} is registered already, by {MIXERS[name]!r}")
        MIXERS[name] = factory
        return factory

    return add


def check_mixer_options(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an unknown mixer or an option its factory does not take."""
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    accepted = set(inspect.signature(MIXERS[name]).parameters) - {"hidden_size", "num_heads", "self"}
    for option in options:
        if option not in accepted:
            raise unknown(f"option of mixer {name!r}:", option, accepted)


def build_mixer(name: str, hidden_size: int, num_heads: int, options: dict[str, Any]) -> nn.Module:
    check_mixer_options(name, options)
    return MIXERS[name](hidden_size=hidden_size, num_heads=num_heads, **options)
