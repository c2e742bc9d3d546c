"""TrainConfig from YAML and back, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from nested_learning._checks import shown
from nested_learning.training.config import TrainConfig

DEEPEST, MOST = 50, 100_000  # levels and values of a YAML file
GROUPS = ("data", "optim")
MERGED = "tag:yaml.org,2002:merge"  # of the key <<
OPEN_FIELDS = ("model",)  # free keys below these: HopeConfig knows them, not this file
FREE = "optim.options"  # likewise: the optimizer knows them


def load_config(path: Path, absent: dict[str, Any] | None = None) -> TrainConfig:
    """The configuration of a YAML file. ValueError for what is wrong in it, OSError if it cannot be read.

    Args:
        absent: values, by dotted name, of keys that are absent in the file; of others the default.
    """
    values = read_yaml(path)
    for name, value in (absent or {}).items():
        group, _, key = name.rpartition(".")
        part = values.get(group) if group else values
        if isinstance(part, dict):
            part.setdefault(key, value)
    check_keys(values, path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, None)
    try:
        return instantiate(parser, parser.parse_object(values))
    except (ArgumentError, OverflowError) as error:
        raise ValueError(f"{path}: {told(error)}") from error


def told(error: Exception) -> str:
    """The message of what jsonargparse raises: of a whole number beyond all floats it is Python's own."""
    if isinstance(error, OverflowError):
        return "a whole number is too large; expected numbers of at most 1e308 in size"
    return str(error)


def instantiate(parser: ArgumentParser, values: Namespace) -> TrainConfig:
    """The TrainConfig among the values that a parser with its fields has read."""
    built = parser.instantiate(values)
    return TrainConfig(**{field.name: built[field.name] for field in dataclasses.fields(TrainConfig)})


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML; `load_config` gives back an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, fit for JSON and YAML."""
    return _plain(dataclasses.asdict(config))


def refuse_changes(saved: TrainConfig, given: dict[str, Any]) -> None:
    """Raise ValueError if any of the given settings, a nested dict, differs from the saved run's.

    The folder may have moved, and earlier versions made a number of steps of a time limit: neither counts.
    """
    known = flatten(to_dict(saved))
    free = ("output", "max_minutes") if saved.max_minutes is None else ("output",)
    asked = {k: v for k, v in flatten(_plain(given)).items() if k not in free}
    changed = [
        f"{key} (now {value!r}, the run has {known.get(key)!r})"
        for key, value in asked.items()
        if value != known.get(key)
    ]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, but these differ: {', '.join(changed)}. "
            "Leave them out, or start a new run in another --output."
        )


def dotted_names(cls: type) -> list[str]:
    """Every key of a configuration class, nested ones with dots."""
    names = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        names.append(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            names += [f"{field.name}.{name}" for name in dotted_names(hints[field.name])]
    return names


def check_keys(values: dict[str, Any], path: str | Path) -> None:
    """Check the keys of a YAML file against TrainConfig, and that its groups are groups.

    Raises:
        ValueError: a key that TrainConfig has not, with the nearest known one; a value where a group belongs.
    """
    known = dotted_names(TrainConfig)
    for name in OPEN_FIELDS + GROUPS:
        group = values.get(name, {})
        if not isinstance(group, dict) or not all(isinstance(key, str) for key in group):
            raise ValueError(f"{name} in {path} is {shown(group)}; expected keys with their values")
    for key in flatten({k: v for k, v in values.items() if k not in OPEN_FIELDS}):
        if key not in known and not key.startswith(f"{FREE}."):
            raise ValueError(f"unknown key {key!r} in {path}.{nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the name most like the given one, or an empty string."""
    by_whole = {option: option for option in sorted(known)}
    by_last = {option.rpartition(".")[2].lstrip("-"): option for option in by_whole}
    last = name.rpartition(".")[2].lstrip("-")
    for wanted, options in ((name, by_whole), (last, by_last)):
        if found := difflib.get_close_matches(wanted, options, n=1, cutoff=0.7):
            return f" Did you mean {options[found[0]]!r}?"
    return ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError if it is not one."""
    with open(path, encoding="utf-8") as file:
        try:
            loader = yaml.SafeLoader(file)
            root = loader.get_single_node()
            _refuse_twice(root)
            values = None if root is None else loader.construct_document(root)
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply; expected at most {DEEPEST} levels") from error
        except Exception as error:  # besides YAMLError what its types raise: dates, numbers, keys
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds {type(values).__name__}; expected a mapping such as `preset: hope-tiny`"
        )
    _check_size(values, path)
    return values


def _refuse_twice(root: yaml.Node | None) -> None:
    """Raise ValueError for a key that stands twice in a mapping: yaml would take the last, without a word."""
    rest, seen = [root], set[int]()
    while rest:
        node = rest.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        items = node.value
        if isinstance(node, yaml.MappingNode):
            first: dict[str, yaml.Mark] = {}
            for key, _ in items:
                if not isinstance(key, yaml.ScalarNode) or key.tag == MERGED:
                    continue
                before = first.setdefault(key.value, key.start_mark)
                if before is not key.start_mark:
                    raise ValueError(
                        f"{shown(key.value)} stands in lines {before.line + 1} and "
                        f"{key.start_mark.line + 1} of one group; expected each key once"
                    )
            items = [value for _, value in items]
        rest += items


def _check_size(values: Any, path: str | Path) -> None:
    """Raise ValueError for values that are nested too deeply, or too many when aliases are written out."""
    rest, count = [(values, 1)], 0
    while rest:
        value, depth = rest.pop()
        count += 1
        if depth > DEEPEST or count > MOST:
            raise ValueError(
                f"{path} is nested too deeply or holds too much; expected at most {DEEPEST} levels and "
                f"{MOST} values"
            )
        if isinstance(value, (dict, list, tuple, set)):
            rest += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys; an empty dict stays a value."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
