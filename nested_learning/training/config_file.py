"""TrainConfig from flags and YAML, and back to YAML. One parser serves the command line and saved runs."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from nested_learning.training.config import TrainConfig

OPEN_FIELDS = ("model",)  # free keys below these: HopeConfig knows them, not this file

# Short flags for the dotted ones that everybody types.
ALIASES = {
    "--data": "--data.source",
    "--tokenizer": "--data.tokenizer",
    "--block_size": "--data.block_size",
    "--lr": "--optim.lr",
}


def build_parser(prog: str, description: str, *, default: TrainConfig | None = None) -> ArgumentParser:
    """A parser with `--config FILE` and a dotted flag for every field of TrainConfig."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the keys below; flags override it"
    )
    parser.add_class_arguments(TrainConfig, None, default=default)
    for action in parser._actions:
        short = next((s for s in action.option_strings if s in ALIASES), None)
        if short:
            action.help, action.metavar = f"short for {ALIASES[short]}", ALIASES[short].split(".")[-1].upper()
        elif action.option_strings and action.metavar == "CONFIG" and action.dest != "config":
            action.help = "the keys of this group as a YAML file or a JSON object"
    return parser


def expand_aliases(argv: Sequence[str]) -> list[str]:
    """Flags as the parser knows them: `--block-size` is `--data.block_size`, with or without `=value`."""
    expanded = []
    for item in argv:
        if item.startswith("--"):
            flag, equals, value = item.partition("=")
            flag = flag.replace("-", "_").replace("__", "--", 1)
            item = ALIASES.get(flag, flag) + equals + value
        expanded.append(item)
    return expanded


def parse_flags(parser: ArgumentParser, argv: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """(the configuration, all parsed values) from command-line flags.

    Raises:
        ValueError: an unknown flag or key, with the nearest known one, or a value of the wrong type.
    """
    argv = expand_aliases(argv)
    known = dotted_names(TrainConfig)
    flags = {option for action in parser._actions for option in action.option_strings}
    for item in argv:
        flag = item.partition("=")[0]
        if flag.startswith("--") and flag not in flags and not _is_known(flag[2:], known):
            raise unknown_key(flag, [*flags, *ALIASES])
    try:
        for path in _config_files(argv):
            _check_keys(read_yaml(path), path)
        values = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return _instantiate(parser, values), values


def load_config(path: Path) -> TrainConfig:
    """The configuration of a YAML file. ValueError for what is wrong in it, OSError if it cannot be read."""
    values = read_yaml(path)
    _check_keys(values, path)
    parser = build_parser("config", "")
    try:
        return _instantiate(parser, parser.parse_object(values))
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from error


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML; `load_config` gives back an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, fit for JSON and YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def differences(saved: TrainConfig, given: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (saved value, given value)} of what differs, the output folder left out."""
    one, two = _flatten(to_dict(saved)), _flatten(to_dict(given))
    keys = [key for key in {**one, **two} if key != "output"]
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def dotted_names(cls: type) -> list[str]:
    """Every key of a configuration class, nested ones with dots."""
    names = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        names.append(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            names += [f"{field.name}.{name}" for name in dotted_names(hints[field.name])]
    return names


def unknown_key(key: str, known: Iterable[str], where: str = "") -> ValueError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # `--lrate` and `--optim.lr` look alike only without the group
        last = {name.rpartition(".")[2].lstrip("-"): name for name in known}
        near = [
            last[m]
            for m in difflib.get_close_matches(key.rpartition(".")[2].lstrip("-"), last, n=1, cutoff=0.5)
        ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    kind = "option" if key.startswith("--") else "key"
    return ValueError(
        f"unknown {kind} {key!r}{where}.{hint} See `nested-learning train --help` for all of them."
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError if it is not one."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds {type(values).__name__}; expected a mapping such as `preset: hope-tiny`"
        )
    return values


def _is_known(name: str, known: Iterable[str]) -> bool:
    return name in known or name.split(".")[0] in OPEN_FIELDS


def _check_keys(values: dict[str, Any], path: str | Path) -> None:
    known = dotted_names(TrainConfig)
    for key in _flatten({k: v for k, v in values.items() if k not in OPEN_FIELDS}):
        if key not in known:
            raise unknown_key(key, known, f" in {path}")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _config_files(argv: Sequence[str]) -> list[str]:
    values = [item.partition("=")[2] for item in argv if item.startswith("--config=")]
    return values + [after for item, after in pairwise(argv) if item == "--config"]


def _instantiate(parser: ArgumentParser, values: Namespace) -> TrainConfig:
    built = parser.instantiate(values)
    return TrainConfig(**{field.name: built[field.name] for field in dataclasses.fields(TrainConfig)})
