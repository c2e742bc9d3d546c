"""The flags of `chat`, `adapt`, `serve` and `lens` that describe levels on a pretrained model; anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from nested_learning.continual.level import Level
    from nested_learning.continual.starts.starts import Starts


# What a level can be told besides its chunk and rate: type, default, help.
_PER_LEVEL: dict[str, tuple[type, Any, str]] = {
    "layers": (str, "all", "'all', 'last third', or indices such as 0,1,2"),
    "rule": (str, "gd", "inner rules: gd, momentum, adam, rms or m3"),
    "clip": (float, 1.0, "largest norm of the gradients that a level's rule is given; 0 for no bound"),
    "rank": (int, 0, "rank of the deltas; 0 for full matrices"),
    "learn_down": (bool, True, "with a rank: learn both factors; false for `up` alone"),
    "sparse": (float, 0.0, "share of the hidden units of each MLP that one write changes; 0 for all weights"),
    "decay": (
        float,
        0.0,
        "share of the delta that each write forgets; with --fisher its own for each weight",
    ),
    "reread": (int, 0, "how often a level goes over its chunk again after its write, and writes again"),
    "distill": (float, 0.0, "weight of learning, when the window closes, to answer without it as with it"),
    "anchor_kl": (float, 0.0, "weight of the pull to what the untouched model predicts of --background"),
    "consolidate": (float, 0.0, "share of the faster level's delta that a level takes over at its boundary"),
    "average_of": (
        int,
        -1,
        "index of the faster level, 0 is the fastest, that a level averages and answers for; -1: none. A "
        "single value of what tells how a level learns is for the other levels",
    ),
    "rate": (float, 0.0, "rate of an average; 0 for levels that are none"),
}
_OF_ALL = ("layers", "rank", "average_of", "rate")  # the others tell how a level learns: averages do not
_LEARNING = ("level_lr", *(name for name in _PER_LEVEL if name not in _OF_ALL))
STARTS = "starts"
LEVEL_FLAGS = ("chunk_sizes", "level_lr", *_PER_LEVEL, STARTS)


def add_level_flags(parser: ArgumentParser, chunk_sizes: Sequence[int], level_lr: float) -> None:
    """Add --chunk_sizes, --level_lr and the other settings of levels, with these defaults."""
    group = parser.add_argument_group("levels, fast to slow; give one value for all, or one per level")
    sizes = list(chunk_sizes)
    group.add_argument(
        "--chunk_sizes", type=int, nargs="+", default=sizes, help="tokens between a level's writes"
    )
    group.add_argument("--level_lr", type=float, nargs="+", default=[level_lr], help="learning rates")
    for name, (kind, default, told) in _PER_LEVEL.items():
        group.add_argument(f"--{name}", type=kind, nargs="+", default=[default], help=told)
    group.add_argument(
        f"--{STARTS}",
        type=str,
        metavar="FILE",
        help="learned rates and starts (adapt --learn_starts), and their levels if no other flag names any",
    )


ANCHOR_FLAGS = ("background", "fisher")


def add_anchor_flags(parser: ArgumentParser) -> None:
    """Add --background and --fisher, files of anchors, to which a memory file belongs that knows them."""
    parser.add_argument(
        "--background", type=str, metavar="FILE", help="text in UTF-8 for levels with --anchor_kl"
    )
    parser.add_argument(
        "--fisher",
        type=str,
        metavar="FILE",
        help="Fisher diagonal for levels with --decay; measured on --background and written there if missing",
    )


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags that a command line has."""
    return {item.partition("=")[0].lstrip("-").replace("-", "_") for item in argv if item.startswith("--")}


def chosen_flags(
    values: Namespace, parser: ArgumentParser, argv: Sequence[str], of: Sequence[str]
) -> list[str]:
    """Names in `of` of flags that a command line has, at their defaults too, or that are not at them."""
    named, defaults = given_flags(argv), parser.get_defaults()
    return [name for name in of if name in named or values[name] != defaults[name]]


def gives_levels(argv: Sequence[str]) -> bool:
    """Whether a command line has one of these flags."""
    return not given_flags(argv).isdisjoint(LEVEL_FLAGS)


def levels_and_starts(values: Namespace, argv: Sequence[str]) -> tuple[tuple[Level, ...], Starts | None]:
    """The levels that a command line describes, or else those of its starts, and what they begin with.

    Raises:
        FileNotFoundError, ValueError: as `levels_of`, or there is no such file of starts.
    """
    if values[STARTS] is None:
        return levels_of(values), None
    from nested_learning.continual.starts.starts import Starts

    starts = Starts.load(values[STARTS])
    described = not given_flags(argv).isdisjoint(set(LEVEL_FLAGS) - {STARTS})
    return (levels_of(values) if described else starts.make_levels()), starts


def levels_of(values: Namespace) -> tuple[Level, ...]:
    """The levels that the flags describe.

    Raises:
        ValueError: a flag has neither one value nor one per level, or a value does not fit.
    """
    from nested_learning.continual.level import Level, check_levels

    count = len(values.chunk_sizes)
    given = {name: _per_level(name, values, count) for name in ("level_lr", *_PER_LEVEL)}
    levels = []
    for index, size in enumerate(values.chunk_sizes):
        own = {name: each[index] for name, each in given.items()}
        own["sparse"], own["clip"] = own["sparse"] or None, own["clip"] or None
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
