"""Checks of settings that come from outside; they need neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import types
import typing
from numbers import Integral, Real
from typing import Any, Literal, Union

LARGEST = 2**53  # whole numbers up to here are the same in JSON, in YAML and as a float
_SHOWN = 200  # characters of a value that a message quotes
_WORDS: dict[Any, str] = {
    int: f"a whole number of at most {LARGEST}",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "keys with their values, the keys being text",
    type(None): "null",
}


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise the ValueError of a setting: what came and what was expected."""
    if not condition:
        raise ValueError(f"{name} is {shown(got)}; expected {expected}. Set --{name} accordingly.")


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_types(config: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass against their annotations.

    Whole numbers are at most 2⁵³ in size, numbers are finite, text has an encoding; a list is as good as a
    tuple.

    Raises:
        ValueError: a field holds something else; it is called by its name after `prefix`.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        require(fits(value, kind), prefix + field.name, value, expected(kind))


def shown(value: object) -> str:
    """A value as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a list inside itself
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation says; see `check_types`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else []
        return len(items) == len(inner) and all(map(fits, items, inner))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, inner[0]) for key in value)
    if kind is str:
        return isinstance(value, str) and "\0" not in value and _has_encoding(value)
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, Integral) and abs(int(value)) <= LARGEST
    if kind is float:
        return isinstance(value, Real) and bool(abs(value) <= 1e308)  # type: ignore[operator]  # False for NaN
    return isinstance(value, kind)


def _has_encoding(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line or of YAML that are no text
        return False
    return True


def expected(kind: Any) -> str:
    """The values of an annotation, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(each) for each in inner)
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is tuple:
        return f"{len(inner)} values, each {expected(inner[0])}"
    if origin is list:
        return f"a list, each of it {expected(inner[0])}"
    if dataclasses.is_dataclass(kind):
        return "a group of keys with their values"
    return _WORDS.get(origin or kind, "another kind of value")
