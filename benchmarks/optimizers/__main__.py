"""The evidence for optimizers as memories: `python -m benchmarks.optimizers PART [options]`.

- `toy`: Fig. 4's valley; steps of momentum and delta momentum to its minimum, over a grid of constants.
- `orthogonal`: forgetting over ten tasks with orthogonal gradients (section 4.3, eq 45).
- `regression`: a changing stream with correlated inputs; gradient descent against DGD (eq 57).
- `digits`: a small vision transformer with AdamW, Muon and M3 (Fig. 11 in miniature).
- `language`: two language models with five optimizers; loss, time of `step()`, state.
- `all`: one after the other.

Each tunes every optimizer's learning rate on a grid, prints a table, and says of each claim whether it holds.
With --cache an interrupted part goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import Cache, OutOfTime, show_claims
from benchmarks.harness import record
from benchmarks.optimizers import digits, language, orthogonal, regression, toy

PARTS = {
    "toy": toy,
    "orthogonal": orthogonal,
    "regression": regression,
    "digits": digits,
    "language": language,
}
SEEDS = {"language": 3}  # 5 for the others


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name in (*PARTS, "all"):
        options = parts.add_parser(name)
        if name != "toy":
            seeds = (
                f"default: 0 to {SEEDS.get(name, 5) - 1}" if name != "all" else "default: those of each part"
            )
            options.add_argument("--seeds", type=int, nargs="+", help=seeds)
        if name in ("language", "all"):
            options.add_argument(
                "--data", default="tinyshakespeare", help="text of the language models: a file, or a source"
            )
        options.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
        more = "; -PART is added to the name" if name == "all" else ""
        options.add_argument("--plot", type=Path, metavar="FILE", help=f"write a PNG{more}")
        options.add_argument("--cache", type=Path, metavar="FILE", help="keep the result of every run here")
        options.add_argument(
            "--max_minutes", type=float, help="start no run that would end later than this; needs --cache"
        )
        options.add_argument(
            "--quick", action="store_true", help="tiny sizes: shows that it runs, the figures mean nothing"
        )
    return parser


def _run(part: str, given: argparse.Namespace, cache: Cache) -> dict[str, Any]:
    """Run a part, print its table and claims, draw its figure."""
    seeds = getattr(given, "seeds", None) or list(range(2 if given.quick else SEEDS.get(part, 5)))
    module: Any = PARTS[part]
    source = {"source": given.data} if part == "language" else {}
    figures = module.run(seeds=seeds, quick=given.quick, cache=cache, **source)
    module.display(figures)
    show_claims(figures["claims"])
    if given.plot:
        path = given.plot.with_stem(f"{given.plot.stem}-{part}") if given.part == "all" else given.plot
        module.plot(figures, path)
    return figures


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.max_minutes is not None and not (given.max_minutes > 0 and given.cache):
        parser.error("--max_minutes is a positive number of minutes, and needs --cache FILE to go on from")
    try:
        cache = Cache(given.cache, given.max_minutes)
    except ValueError as error:
        parser.error(str(error))
    parts = list(PARTS) if given.part == "all" else [given.part]
    try:
        figures = {part: _run(part, given, cache) for part in parts}
    except OutOfTime:
        print(f"Out of time: {given.cache} keeps what is done; the same command goes on from there.")
        raise SystemExit(3) from None
    finally:
        cache.flush()
    return record({"quick": given.quick, "parts": figures}, given.json)


if __name__ == "__main__":
    main()
