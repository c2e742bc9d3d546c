"""Command lines to typed values: the part that the commands share, on top of jsonargparse."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from itertools import islice, pairwise

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from nested_learning.cli.output import QUIET
from nested_learning.training.config_file import check_keys, nearest, read_yaml, told

# Short flags for the dotted ones that everybody types.
DATA_ALIASES = {
    "--data": "--data.source",
    "--tokenizer": "--data.tokenizer",
    "--block_size": "--data.block_size",
}


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions."""


def new_parser(command: str, positional: str, description: str) -> ArgumentParser:
    """A parser that raises instead of exiting and takes no abbreviations, with the flags of all commands.

    `main` acts on --quiet before the command runs.
    """
    parser = ArgumentParser(
        prog=f"nested-learning {command}",
        usage=f"nested-learning {command} {positional}[options]".replace("  ", " "),
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(QUIET, action="store_true", help="no progress bars")
    return parser


def parse(
    parser: ArgumentParser,
    argv: Sequence[str],
    *,
    aliases: Mapping[str, str] | None = None,
    open_groups: Sequence[str] = (),
    defaults: bool = True,
) -> Namespace:
    """The values of a command line.

    Args:
        parser: the parser of the command.
        argv: the arguments; dashes and underscores inside a flag are the same.
        aliases: short flags and what they stand for.
        open_groups: groups below which any key is let through; the code that takes it checks it.
        defaults: include the values of flags that were not given.

    Raises:
        ValueError: an unknown flag, with the nearest known one, or a value of the wrong type.
    """
    aliases = aliases or {}
    argv = [_normal(item, aliases) for item in argv]
    known = {option for action in parser._actions for option in action.option_strings}
    for item in argv:
        flag = item.partition("=")[0]
        if item.startswith("--") and flag not in known and flag[2:].split(".")[0] not in open_groups:
            hint = nearest(flag, [*known, *aliases])
            raise ValueError(f"unknown option {flag!r}.{hint} `{parser.prog} --help` lists all of them.")
    for before, after in pairwise([*argv, ""]):
        if before == "--config" or before.startswith("--config="):
            path = before.partition("=")[2] or after
            if path:  # else the parser says that it is missing
                check_keys(read_yaml(path), path)
    try:
        return parser.parse_args(_widest_first(argv, known, open_groups), defaults=defaults)
    except (ArgumentError, OverflowError) as error:
        raise ValueError(told(error)) from error


def _widest_first(argv: Sequence[str], known: Collection[str], open_groups: Sequence[str]) -> list[str]:
    """The arguments with files first, then groups, then the rest: what comes later counts.

    So a flag of one key counts wherever it stands, and is not lost to a file that stands behind it.
    """
    groups = {option for option in known if any(other.startswith(f"{option}.") for other in known)}
    groups |= {f"--{name}" for name in open_groups}
    files: list[str] = []
    wide: list[str] = []
    rest: list[str] = []
    items = iter(argv)
    for item in items:
        flag, equals, _ = item.partition("=")
        part = files if flag == "--config" else wide if flag in groups else rest
        part.append(item)
        if part is not rest and not equals:
            part += islice(items, 1)
    return [*files, *wide, *rest]


def hide_group_flags(parser: ArgumentParser, aliases: Mapping[str, str]) -> None:
    """Say in the help what the flag of a whole group is: an alias, or a YAML file of that group."""
    for action in parser._actions:
        for option in action.option_strings:
            if option in aliases:
                action.help = f"short for {aliases[option]}"
                action.metavar = aliases[option].rpartition(".")[2].upper()
            elif action.metavar == "CONFIG" and action.dest != "config":
                action.help = "the keys of this group as a YAML file or a JSON object"


def _normal(item: str, aliases: Mapping[str, str]) -> str:
    if not item.startswith("--"):
        return item
    flag, equals, value = item.partition("=")
    flag = "--" + flag[2:].replace("-", "_")
    return aliases.get(flag, flag) + equals + value
