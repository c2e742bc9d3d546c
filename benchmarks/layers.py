"""Tokens per second of every sequence layer: `python -m benchmarks.layers [mixers|compile|training]`.

- `mixers`: each registered mixer at the same size, forward and forward + backward, interleaved. A gate first:
  each layer equals a float64 copy of itself that is fed token by token.
- `compile`: memories plainly and with `set_compile_step`, in both passes, and the seconds that the first ones
  take with it: Titans and self-modifying Titans against their chunks written out by hand, and rows that no
  engine is written out for. It needs a C++ compiler, and minutes. A gate first: both give the same.
- `training`: layers and a training step of hope-tiny through torch.compile against plain, and the seconds of
  the first step at two lengths; see compilation.py. It needs a C++ compiler, and minutes.

`--only NAME ...` chooses mixers. With `--against FOLDER` the mixers here against those of another commit, in
both passes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import against, cases, compilation, gate
from benchmarks.cases import forward, slopes
from benchmarks.compilation import WRITTEN_OUT
from benchmarks.harness import interleaved, parameters, parser, record, show
from nested_learning.layers import MIXERS, set_compile_step

SHAPE = {"batch": 4, "tokens": 1024, "width": 256, "heads": 4, "chunk": 64}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}
GENERIC = ("ttt_mlp", "dla", "moneta", "yaad", "memora")


def checked_mixers(shape: dict[str, int], only: list[str] | None) -> dict[str, torch.nn.Module]:
    """The registered mixers, or those of `only`, each of which equals itself token by token."""
    layers = cases.mixers(shape, only)
    for layer in layers.values():
        gate.equals_itself_token_by_token(layer, shape["width"], 2 * shape["chunk"] + 3)
    return layers


def mixers(shape: dict[str, int], repeats: int, only: list[str] | None) -> dict[str, Any]:
    """Tokens per second of each registered mixer."""
    layers = checked_mixers(shape, only)
    x = cases.inputs(shape)
    fast = interleaved(
        {name: lambda layer=layer: forward(layer, x) for name, layer in layers.items()}, repeats
    )
    both = interleaved(
        {name: lambda layer=layer: slopes(layer, x) for name, layer in layers.items()}, repeats
    )
    tokens = shape["batch"] * shape["tokens"]
    rows = [
        {
            "mixer": name,
            "parameters": parameters(layer),
            "forward, tokens/s": tokens / fast[name],
            "forward + backward, tokens/s": tokens / both[name],
            "of attention": both["attention"] / both[name] if "attention" in both else None,
        }
        for name, layer in layers.items()
    ]
    show(f"sequence layers, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def compiling(shape: dict[str, int], repeats: int, only: list[str] | None) -> dict[str, Any]:
    """Speed of memories with their chunks compiled by torch.compile, relative to plain."""
    rows = [
        compiled_against_plain(name, shape, repeats)
        for name in (*WRITTEN_OUT, *GENERIC)
        if only is None or name in only
    ]
    show(f"compiled chunks, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def compiled_against_plain(name: str, shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """One memory: how much faster each pass is with compiled chunks, and the seconds of the first passes."""
    torch.manual_seed(0)
    x, plain = cases.inputs(shape), cases.mixer(name, shape)
    compiled = copy.deepcopy(plain)
    set_compile_step(compiled, True)
    row: dict[str, Any] = {"memory": name}
    passes: dict[str, Callable[[torch.nn.Module], list[torch.Tensor]]] = {
        "forward": lambda layer: [forward(layer, x)],
        "forward + backward": lambda layer: slopes(layer, x),
    }
    for title, work in passes.items():
        start = time.perf_counter()
        found = work(compiled)
        row[f"{title}, first, s"] = time.perf_counter() - start
        for a, b in zip(found, work(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
        seconds = interleaved(
            {"plain": lambda work=work: work(plain), "compiled": lambda work=work: work(compiled)}, repeats
        )
        row[f"{title}, compiled, tokens/s"] = x.shape[0] * x.shape[1] / seconds["compiled"]
        row[f"{title}, of plain"] = seconds["plain"] / seconds["compiled"]
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["mixers", "compile", "training"], nargs="?", default="mixers")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these mixers alone")
    against.add_option(options)
    given = options.parse_args(arguments)
    known = {
        "mixers": sorted(set(MIXERS) - {"memory"}),
        "compile": (*WRITTEN_OUT, *GENERIC),
        "training": WRITTEN_OUT,
    }[given.question]
    for name in given.only or ():
        if name not in known:
            options.error(f"argument --only: unknown mixer {name!r}; known: {', '.join(known)}")
    shape, repeats = QUICK if given.quick else SHAPE, given.repeats or (1 if given.quick else 10)
    if given.against is None:
        measure = {"mixers": mixers, "compile": compiling, "training": compilation.training}[given.question]
        return record({given.question: measure(shape, repeats, given.only)}, given.json)
    if given.question != "mixers":
        options.error(
            f"argument --against: not with the question `{given.question}`, as its switch is no public name"
        )
    checked_mixers(shape, given.only)
    settings = {"shape": shape, "only": given.only}
    return record({"against": against.compare(given.against, [("layers", settings)], repeats)}, given.json)


if __name__ == "__main__":
    main()
