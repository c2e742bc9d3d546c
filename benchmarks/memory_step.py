"""Speed of a memory layer that learns: `python -m benchmarks.memory_step [--json FILE]`.

Forward and backward of one self-modifying layer of hope-tiny's shape, the run that is written out by
chunks against the generic engine, interleaved in one process, medians. A gate first: no timing unless the two
agree in outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import slopes
from benchmarks.harness import interleaved, parser, record, show
from nested_learning.layers import SelfModifyingTitans
from nested_learning.memory import engine
from nested_learning.memory.engines import generic

SHAPE = {"batch": 16, "tokens": 256, "width": 128, "heads": 4, "chunk": 32}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}


@contextmanager
def generic_only() -> Iterator[None]:
    """Let the generic engine run every layer."""
    engines = engine.ENGINES
    engine.ENGINES = (generic,)
    engine.choose.cache_clear()
    try:
        yield
    finally:
        engine.ENGINES = engines
        engine.choose.cache_clear()


def generic_slopes(layer: SelfModifyingTitans, x: Tensor) -> list[Tensor]:
    """`slopes` by the generic engine."""
    with generic_only():
        return slopes(layer, x)


def measure(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Median milliseconds of both steps, and their ratio."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    x = torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)
    for a, b in zip(slopes(layer, x), generic_slopes(layer, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    works = {"chunked": lambda: slopes(layer, x), "generic": lambda: generic_slopes(layer, x)}
    seconds = interleaved(works, repeats)
    rows = [
        {
            "step": name,
            "forward + backward, ms": 1e3 * value,
            "faster than generic by": seconds["generic"] / value,
        }
        for name, value in seconds.items()
    ]
    show(f"self_modifying_titans, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    for name, value in SHAPE.items():
        options.add_argument(f"--{name}", type=int, help=f"default {value}")
    given = options.parse_args(arguments)
    shape = {name: getattr(given, name) or size for name, size in (QUICK if given.quick else SHAPE).items()}
    return record(measure(shape, given.repeats or (1 if given.quick else 10)), given.json)


if __name__ == "__main__":
    main()
