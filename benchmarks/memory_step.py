"""How fast a memory layer learns: `python -m benchmarks.memory_step [--json FILE]`.

Forward and backward of one self-modifying layer of hope-tiny's shape, the fused run against the generic step,
interleaved in one process, medians. A gate first: no timing unless the two agree in outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nested_learning.layers import SelfModifyingTitans
from nested_learning.memory import fused
from nested_learning.training.report import hardware, versions


@contextmanager
def generic_only() -> Iterator[None]:
    """Let every layer take the generic step."""
    supports = fused.supports
    fused.supports = lambda *_: False
    try:
        yield
    finally:
        fused.supports = supports


def run(layer: SelfModifyingTitans, x: Tensor) -> tuple[float, list[Tensor]]:
    """Seconds of one forward and backward pass, and the output and gradients it gave."""
    start = time.perf_counter()
    y, _ = layer(x)
    gradients = torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])
    return time.perf_counter() - start, [y.detach(), *gradients]


def measure(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Medians in milliseconds and their ratio."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    x = torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)
    _, fast = run(layer, x)
    with generic_only():
        _, slow = run(layer, x)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    times: dict[str, list[float]] = {"fused": [], "generic": []}
    for _ in range(repeats):
        times["fused"].append(run(layer, x)[0])
        with generic_only():
            times["generic"].append(run(layer, x)[0])
    milliseconds = {name: 1e3 * median(values) for name, values in times.items()}
    return {
        "shape": shape,
        "repeats": repeats,
        "milliseconds_forward_backward": milliseconds,
        "fused_is_faster_by": milliseconds["generic"] / milliseconds["fused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"batch": 16, "tokens": 256, "width": 128, "heads": 4, "chunk": 32}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in sizes}
    result = {
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
        **measure(shape, arguments.repeats),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
