"""Tokens per second of every sequence layer: `python -m benchmarks.layers [mixers|compile|training]`.

- `mixers`: each registered mixer at the same size, forward and forward + backward, interleaved. A gate first:
  each layer equals a float64 copy of itself that is fed token by token.
- `compile`: memories that no engine is written out for, forward + backward, plainly and with
  `set_compile_step`, and the seconds that the first pass takes with it. It needs a C++ compiler, and minutes.
  A gate first: both give the same.
- `training`: layers and a training step of hope-tiny through torch.compile against plain, and the seconds of
  the first step at two lengths; see compilation.py. It needs a C++ compiler, and minutes.

`--only NAME ...` chooses mixers. With `--against FOLDER` the mixers here against those of another commit, in
both passes.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from benchmarks import against, cases, compilation, gate
from benchmarks.cases import forward, slopes
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
    """Speed of memories with their chunk's step compiled by torch.compile, relative to plain."""
    torch.manual_seed(0)
    x = cases.inputs(shape)
    rows = []
    for name in (name for name in GENERIC if only is None or name in only):
        plain = cases.mixer(name, shape)
        compiled = copy.deepcopy(plain)
        set_compile_step(compiled, True)
        start = time.perf_counter()
        found = slopes(compiled, x)
        first = time.perf_counter() - start
        for a, b in zip(found, slopes(plain, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
        layers = {"plain": plain, "compiled": compiled}
        seconds = interleaved(
            {how: lambda layer=layer: slopes(layer, x) for how, layer in layers.items()}, repeats
        )
        rows.append(
            {
                "memory": name,
                "plain, tokens/s": x.shape[0] * x.shape[1] / seconds["plain"],
                "compiled, tokens/s": x.shape[0] * x.shape[1] / seconds["compiled"],
                "ratio": seconds["plain"] / seconds["compiled"],
                "first pass, s": first,
            }
        )
    show(f"compiled step, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["mixers", "compile", "training"], nargs="?", default="mixers")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these mixers alone")
    against.add_option(options)
    given = options.parse_args(arguments)
    known = {
        "mixers": sorted(set(MIXERS) - {"memory"}),
        "compile": GENERIC,
        "training": compilation.WRITTEN_OUT,
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
