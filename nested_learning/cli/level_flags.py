"""The flags of `chat` and `adapt` that describe levels on a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from nested_learning.continual.level import Level


def add_level_flags(parser: ArgumentParser, chunk_sizes: Sequence[int], level_lr: float) -> None:
    """Add --chunk_sizes, --level_lr, --layers, --rule and --rank, with these defaults."""
    group = parser.add_argument_group("levels, fast to slow; give one value for all, or one per level")
    group.add_argument(
        "--chunk_sizes",
        type=int,
        nargs="+",
        default=list(chunk_sizes),
        help="tokens between a level's writes",
    )
    group.add_argument("--level_lr", type=float, nargs="+", default=[level_lr], help="learning rates")
    group.add_argument(
        "--layers", type=str, nargs="+", default=["all"], help="'all', 'last third', or indices such as 0,1,2"
    )
    group.add_argument(
        "--rule", type=str, nargs="+", default=["gd"], help="inner rules: gd, momentum, adam or m3"
    )
    group.add_argument(
        "--rank", type=int, nargs="+", default=[0], help="rank of the deltas; 0 for full matrices"
    )


LEVEL_FLAGS = ("chunk_sizes", "level_lr", "layers", "rule", "rank")


def gives_levels(argv: Sequence[str]) -> bool:
    """Whether a command line has one of these flags."""
    given = {item.partition("=")[0].lstrip("-").replace("-", "_") for item in argv if item.startswith("--")}
    return not given.isdisjoint(LEVEL_FLAGS)


def levels_of(values: Namespace) -> tuple[Level, ...]:
    """The levels that the flags describe.

    Raises:
        ValueError: a flag has neither one value nor one per level, or a value does not fit.
    """
    from nested_learning.continual.level import Level, check_levels

    count = len(values.chunk_sizes)
    rates, layers = _per_level("level_lr", values, count), _per_level("layers", values, count)
    rules, ranks = _per_level("rule", values, count), _per_level("rank", values, count)
    return check_levels(
        [
            Level(size, lr, layers=_layers(which), rule=rule, rank=rank or None)
            for size, lr, which, rule, rank in zip(
                values.chunk_sizes, rates, layers, rules, ranks, strict=True
            )
        ]
    )


def _per_level(name: str, values: Namespace, count: int) -> list[Any]:
    given = values[name]
    if len(given) not in (1, count):
        raise ValueError(
            f"--{name} has {len(given)} values for {count} levels (--chunk_sizes); give one, or one per level"
        )
    return given * count if len(given) == 1 else given


def _layers(text: str) -> str | list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return text
