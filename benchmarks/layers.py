"""Tokens per second of every sequence layer: `python -m benchmarks.layers [mixers|compile]`.

- `mixers`: each registered mixer at the same size, forward and forward + backward, interleaved. A gate first:
  each layer equals a float64 copy of itself that is fed token by token.
- `compile`: memories without a fused run, forward + backward, plainly and with `set_compile_step`, and the
  seconds that the first pass takes with it. It needs a C++ compiler, and minutes. A gate first: both give
  the same.
"""

from __future__ import annotations

import copy
import inspect
import time
from typing import Any

import torch

from benchmarks import gate
from benchmarks.harness import forward, interleaved, parameters, parser, record, show, slopes
from nested_learning.layers.memory import set_compile_step
from nested_learning.layers.registry import MIXERS, build_mixer

SHAPE = {"batch": 4, "tokens": 1024, "width": 256, "heads": 4, "chunk": 64}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}
UNFUSED = ("ttt_mlp", "dla", "moneta", "yaad", "memora")


def build(name: str, shape: dict[str, int]) -> torch.nn.Module:
    """A mixer with its defaults at this size; a window sees as far as a chunk."""
    accepted = inspect.signature(MIXERS[name]).parameters
    given = {"chunk_size": shape["chunk"], "window": shape["chunk"]}
    options = {option: value for option, value in given.items() if option in accepted}
    return build_mixer(name, shape["width"], shape["heads"], options)


def mixers(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Tokens per second of each registered mixer."""
    torch.manual_seed(0)
    layers = {name: build(name, shape) for name in sorted(MIXERS) if name != "memory"}  # needs its parts
    for layer in layers.values():
        gate.equals_itself_token_by_token(layer, shape["width"], 2 * shape["chunk"] + 3)
    x = torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)
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
            "of attention": both["attention"] / both[name],
        }
        for name, layer in layers.items()
    ]
    show(f"sequence layers, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def compiling(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """What torch.compile of the chunk's step gains."""
    torch.manual_seed(0)
    x = torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)
    rows = []
    for name in UNFUSED:
        plain = build(name, shape)
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
    options.add_argument("question", choices=["mixers", "compile"], nargs="?", default="mixers")
    given = options.parse_args(arguments)
    measure = {"mixers": mixers, "compile": compiling}[given.question]
    figures = {
        given.question: measure(QUICK if given.quick else SHAPE, given.repeats or (1 if given.quick else 10))
    }
    return record(figures, given.json)


if __name__ == "__main__":
    main()
