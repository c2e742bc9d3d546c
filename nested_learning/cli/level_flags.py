"""The flags of `chat`, `adapt`, `serve` and `lens` that describe levels on a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from nested_learning.continual.level import Level


_LEARNING = ("level_lr", "rule", "learn_down", "sparse")
_ALL = ("layers", "rank", "average_of", "rate")


def add_level_flags(parser: ArgumentParser, chunk_sizes: Sequence[int], level_lr: float) -> None:
    """Add --chunk_sizes, --level_lr and the other settings of levels, with these defaults."""
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
    group.add_argument(
        "--learn_down",
        type=bool,
        nargs="+",
        default=[True],
        help="with a rank: learn both factors; false for `up` alone",
    )
    group.add_argument(
        "--sparse",
        type=float,
        nargs="+",
        default=[0.0],
        help="share of the hidden units of each MLP that one write changes; 0 for all weights",
    )
    group.add_argument(
        "--average_of",
        type=int,
        nargs="+",
        default=[-1],
        help="index of the faster level, 0 is the fastest, that a level averages and answers for; -1: none. "
        "A single --level_lr, --rule, --sparse or --learn_down is for the other levels",
    )
    group.add_argument(
        "--rate", type=float, nargs="+", default=[0.0], help="rate of an average; 0 for levels that are none"
    )


LEVEL_FLAGS = ("chunk_sizes", *_LEARNING, *_ALL)


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
    given = {name: _per_level(name, values, count) for name in (*_LEARNING, *_ALL)}
    levels = []
    for index, size in enumerate(values.chunk_sizes):
        own = {name: each[index] for name, each in given.items()}
        own["sparse"] = own["sparse"] or None
        average_of = own["average_of"]
        # one value for all is one for all that learn: an average has no such settings
        for name in _LEARNING if average_of >= 0 else ():
            if len(values[name]) == 1:
                del own[name]
        levels.append(
            Level(
                size,
                **{name.removeprefix("level_"): value for name, value in own.items() if name in _LEARNING},
                layers=_layers(own["layers"]),
                rank=own["rank"] or None,
                average_of=None if average_of == -1 else average_of,
                rate=own["rate"] or None,
            )
        )
    return check_levels(levels)


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
