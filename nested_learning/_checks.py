"""Checks of settings that come from outside; they need neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union

LARGEST = 2**53  # whole numbers up to here are the same in JSON, in YAML and as a float
_SHOWN = 200  # characters of a value that a message quotes
_ROWS = (list, tuple, Sequence, MutableSequence)
_TABLES = (dict, Mapping, MutableMapping)
_WORDS: dict[Any, str] = {
    int: f"a whole number of at most {LARGEST}",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    **dict.fromkeys(_TABLES, "keys with their values, the keys being text"),
    type(None): "null",
}


class KeyTwice(ValueError):
    """A group of JSON names a key twice."""


def require(condition: bool, name: str, got: object, expected: str, how: str = "--{}") -> None:
    """Raise the ValueError of a setting: what came, what was expected, and `how` the name is set."""
    if not condition:
        raise ValueError(f"{name} is {shown(got)}; expected {expected}. Set {how.format(name)} accordingly.")


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def require_seed(seed: int, how: str = "--{}") -> None:
    """Raise the ValueError of a setting `seed` that random generators do not take; `how` it is set."""
    require(0 <= seed < 2**32, "seed", seed, "a whole number from 0 to 2**32 - 1", how)


def require_folder_name(name: str, folder: str | None) -> None:
    """Raise the ValueError of a setting that names a folder by no text, which would be the current one."""
    require(folder != "", name, folder, "the path of a folder; the current one is '.'")


def check_types(config: Any, prefix: str = "", how: str = "--{}") -> None:
    """Check the fields of a dataclass against their annotations.

    Whole numbers are at most 2⁵³ in size, numbers are finite, text has an encoding; a list is as good as a
    tuple. A kind that values cannot be told by (a type variable, a protocol) is let through.

    Args:
        config: the dataclass.
        prefix: what stands before a field's name in messages.
        how: how a setting is set, its name in the place of {}.

    Raises:
        ValueError: a field holds something else, and is called by its name after `prefix`; an annotation
            names what cannot be found.
    """
    try:
        hints = typing.get_type_hints(type(config))
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"the annotations of {type(config).__name__} cannot be read ({_named(type(config), error)}); "
            "expected types that its module has when it runs"
        ) from error
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        require(fits(value, kind), prefix + field.name, value, expected(kind), how)


def check_fields(found: object, kinds: Mapping[str, Any], optional: Sequence[str] = ()) -> None:
    """Check the values of a JSON object, by their names, against annotations.

    Args:
        found: the object.
        kinds: annotation of each value; others may be there too.
        optional: names that may be missing.

    Raises:
        ValueError: it is no object, or a value is missing or of another kind; see `check_types`.
    """
    if not isinstance(found, dict):
        raise ValueError(f"it is {shown(found)}; expected keys with their values")
    for name, kind in kinds.items():
        if name not in found:
            if name not in optional:
                raise ValueError(f"its {name} is missing")
        elif not fits(found[name], kind):
            raise ValueError(f"its {name} is {shown(found[name])}; expected {expected(kind)}")


def _named(cls: type, error: Exception) -> str:
    """The error of a class's annotations, with the fields whose annotation alone raises it."""
    wrong = []
    for field in dataclasses.fields(cls):
        alone = type(
            cls.__name__, (), {"__annotations__": {field.name: field.type}, "__module__": cls.__module__}
        )
        try:
            typing.get_type_hints(alone)
        except (NameError, AttributeError, TypeError, SyntaxError):
            wrong.append(f"{field.name}: {field.type}")
    return f"{', '.join(wrong)}: {error}" if wrong else str(error)


def shown(value: object) -> str:
    """A value as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a list inside itself
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation says; see `check_types`."""
    kind = getattr(kind, "__supertype__", kind)  # of a typing.NewType
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if (origin or kind) in _ROWS:
        return isinstance(value, (list, tuple)) and (not inner or _items_fit(value, origin, inner))
    if origin in _TABLES:
        return isinstance(value, Mapping) and all(
            fits(part, own) for item in value.items() for part, own in zip(item, inner, strict=False)
        )
    if kind is str:
        return isinstance(value, str) and "\0" not in value and has_encoding(value)
    if isinstance(value, bool):
        return kind in (bool, object) or not _can_be_told(kind)
    if kind is int:
        return isinstance(value, Integral) and abs(int(value)) <= LARGEST
    if kind is float:
        return isinstance(value, Real) and bool(abs(value) <= 1e308)  # type: ignore[operator]  # False for NaN
    return not _can_be_told(origin or kind) or isinstance(value, origin or kind)


def _items_fit(items: Sequence[Any], origin: Any, inner: tuple[Any, ...]) -> bool:
    """Whether the items of a list or tuple are of the kinds in an annotation's brackets."""
    if origin is tuple and inner[-1] is not Ellipsis:
        return len(items) == len(inner) and all(map(fits, items, inner))
    return all(fits(item, inner[0]) for item in items)


def _can_be_told(kind: Any) -> bool:
    """Whether isinstance answers for a kind: not for a type variable or a protocol."""
    try:
        isinstance(None, kind)
    except TypeError:
        return False
    return True


def each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Object of JSON, as a hook of `json.loads`, which would take the last of two values of a key in silence.

    Raises:
        ValueError: a key stands twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyTwice(f"{shown(key)} stands twice in one group of the JSON; expected each key once")
        found[key] = value
    return found


def has_encoding(text: str) -> bool:
    """Whether a text is one: no half of a surrogate pair is in it, which tokenizers and files do not take."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line or of YAML that are no text
        return False
    return True


def check_text(text: str, what: str = "the text") -> None:
    """Raise ValueError for a text that no tokenizer takes; `what` it is, for the message."""
    if not has_encoding(text):
        raise ValueError(
            f"{what} has half of a surrogate pair, which is no character (bytes that are not UTF-8, or an "
            "emoji that was cut in two); give whole characters, in UTF-8"
        )


def expected(kind: Any) -> str:
    """The values of an annotation, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(each) for each in inner)
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        each = [expected(item) for item in inner]
        return f"{len(each)} values" + (f", each {each[0]}" if len({*each}) == 1 else f": {', '.join(each)}")
    if (origin or kind) in _ROWS:
        return f"a list, each of it {expected(inner[0])}" if inner else "a list"
    if dataclasses.is_dataclass(kind):
        return "a group of keys with their values"
    return _WORDS.get(origin or kind, "another kind of value")
