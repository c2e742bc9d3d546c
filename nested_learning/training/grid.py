"""Grids of settings: `optim.lr=3e-3,1e-2;optim.weight_decay=0,0.1` as values by key, and what they change."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nested_learning._checks import KeyTwice, each_key_once
from nested_learning._errors import unknown
from nested_learning.training.config import OptimConfig

if TYPE_CHECKING:
    from nested_learning.training.contestants import Contestant

# Values by dotted key, such as "optim.lr".
Grid = Mapping[str, Sequence[Any]]
# One value by dotted key.
Setting = dict[str, Any]

MOST_SETTINGS = 1000
OPTIONS, MODEL = "optim.options.", "model."
FIELDS = tuple(f"optim.{f.name}" for f in dataclasses.fields(OptimConfig) if f.name not in ("name", "levels"))
SYNTAX = "KEY=VALUE,VALUE;KEY=VALUE,VALUE, such as 'optim.lr=3e-3,1e-2;optim.weight_decay=0,0.1'"


def parse_grid(text: str) -> dict[str, list[Any]]:
    """The grid that a text describes.

    Keys are separated by semicolons, their values by commas; both may stand inside brackets, braces and
    double quotes, as in `optim.betas=[0.9,0.95],[0.9,0.99]`. A value is JSON, or else a word.

    Raises:
        ValueError: a part without "=", a key twice, or what `check_grid` refuses.
    """
    grid: dict[str, list[Any]] = {}
    for part in _split(text, ";"):
        key, equals, values = part.partition("=")
        key = key.strip()
        if not equals or not key or not values.strip():
            raise ValueError(f"--grid has the part {part.strip()!r}; expected {SYNTAX}")
        if key in grid:
            raise ValueError(f"--grid has {key!r} twice; expected {SYNTAX}")
        grid[key] = [_value(value) for value in _split(values, ",")]
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Raise ValueError for keys that no setting has, values that are not all different, too many settings."""
    count = 1
    for key, values in grid.items():
        if key in ("optim.name", "optim.levels"):
            raise ValueError(
                f"--grid has {key!r}: optimizers are compared as models, MODEL:OPTIMIZER, and levels as "
                "training YAMLs"
            )
        free = key.startswith((OPTIONS, MODEL)) and not key.endswith(".")
        if not free and key not in FIELDS:
            known = {*FIELDS, "model.FIELD", "optim.options.OPTION"}
            raise unknown("key of --grid:", key, known)
        written = [json.dumps(value, sort_keys=True) for value in values]
        if not written or len(set(written)) < len(written):
            raise ValueError(
                f"{key} of --grid has the values {list(values)}; expected one or more, all different"
            )
        count *= len(written)
    if count > MOST_SETTINGS:
        raise ValueError(f"--grid has {count:,} settings; expected at most {MOST_SETTINGS:,}")


def settings_of(grid: Grid) -> list[Setting]:
    """All combinations of a grid's values, the last key moving fastest; one empty setting for no grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuned(contestant: Contestant, setting: Setting) -> Contestant:
    """A contestant with the values of a setting.

    Raises:
        ValueError: a value that the optimizer's configuration refuses.
    """
    fields: dict[str, Any] = {}
    options = dict(contestant.optim.options)
    overrides = contestant.overrides
    for key, value in setting.items():
        if key.startswith(MODEL):
            overrides = _with(overrides, key.removeprefix(MODEL).split("."), value)
        elif key.startswith(OPTIONS):
            options[key.removeprefix(OPTIONS)] = value
        else:
            fields[key.removeprefix("optim.")] = tuple(value) if isinstance(value, list) else value
    optim = dataclasses.replace(contestant.optim, **{"options": options, **fields})
    return dataclasses.replace(contestant, optim=optim, overrides=overrides)


def described(value: Any) -> str:
    """A value of a setting as a table shows it."""
    return (
        f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def _with(values: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Nested dicts with another value at a path."""
    first, *rest = path
    inner = values.get(first)
    if rest:
        value = _with(inner if isinstance(inner, dict) else {}, rest, value)
    return {**values, first: value}


def _value(text: str) -> Any:
    text = text.strip()
    if not text:
        raise ValueError(f"--grid has an empty value; expected {SYNTAX}")
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except KeyTwice as error:
        raise ValueError(f"--grid has the value {text!r}: {error}") from None
    except ValueError:
        if text[0] in '[{"':
            raise ValueError(f"--grid has the value {text!r}, which is no JSON; expected {SYNTAX}") from None
        return text


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that stand outside of brackets, braces and double quotes."""
    parts, depth, quoted = [""], 0, False
    for before, letter in itertools.pairwise(["", *text]):
        quoted ^= letter == '"' and before != "\\"
        if not quoted:
            depth += (letter in "[{") - (letter in "]}")
        if letter == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
