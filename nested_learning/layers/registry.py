"""Mixers by name: what `HopeConfig(mixer=...)` accepts.

A mixer is an nn.Module with `forward(x, state=None, mask=None, **) -> (y, state)` on [B, T, D]. Its
factory takes the width and the number of heads of the model and the mixer's own options as keywords.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

MIXERS: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Class decorator: make a layer available as `mixer=name`."""

    def add(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in MIXERS:
            raise ValueError(f"mixer {name!r} is registered already, by {MIXERS[name]!r}")
        MIXERS[name] = factory
        return factory

    return add


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: what came, the nearest one, all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


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
