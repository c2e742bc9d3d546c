"""Contestants of a comparison: a model, an optimizer, both by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_learning._errors import unknown
from nested_learning.models.presets import PRESETS
from nested_learning.optimizers.recipe import by_name
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import load_config
from nested_learning.training.models import preset_or_yaml
from nested_learning.training.run_folder import YAML_SUFFIXES


@dataclass(frozen=True)
class Contestant:
    """A model and what trains it.

    Attributes:
        name: how the caller called it, such as "hope-tiny:m3".
        preset, overrides: the model.
        optim: optimizers and schedule.
    """

    name: str
    preset: str
    overrides: dict[str, Any]
    optim: OptimConfig


def contestant(name: str, optim: OptimConfig) -> Contestant:
    """The contestant of a name: MODEL or MODEL:OPTIMIZER.

    MODEL is a preset, or a training YAML, of which the keys `preset` and `model` count, and of `optim` the
    name, levels and options where it gives any. OPTIMIZER trains the whole model, without levels.

    Args:
        name: the name.
        optim: the comparison's optimizer and schedule.

    Raises:
        ValueError: no such model or optimizer.
        OSError: the YAML cannot be read.
    """
    model, colon, by = name.rpartition(":")
    if not colon or name in PRESETS or Path(name).suffix in YAML_SUFFIXES:
        model, by = name, ""
    elif not by:
        raise ValueError(
            f"the model {name!r} ends in a colon; expected MODEL:OPTIMIZER, such as {model}:m3, or {model} "
            "alone"
        )
    base, overrides = preset_or_yaml(model)
    if by:
        if by.lower() not in by_name():
            raise unknown("optimizer", by.lower(), by_name())
        same = by.lower() == optim.name.lower()
        options = optim.options if same else {}
        return Contestant(
            name, base, overrides, dataclasses.replace(optim, name=by, levels=[], options=options)
        )
    if Path(model).suffix in YAML_SUFFIXES:
        own, default = load_config(Path(model)).optim, OptimConfig()
        given = {key: getattr(own, key) for key in ("name", "levels", "options")}
        if any(value != getattr(default, key) for key, value in given.items()):
            return Contestant(name, base, overrides, dataclasses.replace(optim, **given))
    return Contestant(name, base, overrides, optim)
