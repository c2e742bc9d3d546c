"""Share of the machine's speed that a memory layer reaches: `python -m benchmarks.roofline`.

Floating-point operations per second of self-modifying Titans, counted by a fixed formula, as a fraction of
the rate of a 1024³ float32 torch.mm in the same run. The formula counts the operations that the algorithm
needs, not those that the code does: per token and head 56 products of 2·d² operations, d the head width, and
five projections of 2·width² operations forward; three times that forward + backward; recomputation does not
count.

With `--against FOLDER` both passes here against those of another commit.

A gate first: the layer equals the token-by-token oracle.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import against, cases, gate
from benchmarks.cases import forward, slopes
from benchmarks.harness import interleaved, parser, record, show
from nested_learning.layers import SelfModifyingTitans

SHAPE = {"batch": 4, "tokens": 2048, "width": 512, "heads": 8, "chunk": 64}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}
PRODUCTS = 56  # products of 2·d² operations each, per token and head
PROJECTIONS = 5  # products of 2·width² operations each, per token
SIDE = 1024  # width of the square matrices of the torch.mm


def operations(shape: dict[str, int]) -> int:
    """Floating-point operations of a forward pass, by the formula."""
    head = shape["width"] // shape["heads"]
    per_token = PRODUCTS * 2 * head**2 * shape["heads"] + PROJECTIONS * 2 * shape["width"] ** 2
    return per_token * shape["batch"] * shape["tokens"]


def checked(shape: dict[str, int]) -> SelfModifyingTitans:
    """The layer, which equals its oracle."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    gate.equals_oracle(layer, shape["chunk"] + 9)
    return layer


def measure(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Rate of both passes, relative to torch.mm's."""
    layer, x = checked(shape), cases.inputs(shape)
    a, b = torch.randn(2, SIDE, SIDE)
    seconds = interleaved(
        {
            "torch.mm": lambda: torch.mm(a, b),
            "forward": lambda: forward(layer, x),
            "forward + backward": lambda: slopes(layer, x),
        },
        repeats,
    )
    work = {
        "torch.mm": 2 * SIDE**3,
        "forward": operations(shape),
        "forward + backward": 3 * operations(shape),
    }
    rate = {name: work[name] / value for name, value in seconds.items()}
    tokens = shape["batch"] * shape["tokens"]
    rows = [
        {
            "pass": name,
            "GFLOP/s": 1e-9 * value,
            "of torch.mm": value / rate["torch.mm"],
            "tokens/s": None if name == "torch.mm" else tokens / seconds[name],
        }
        for name, value in rate.items()
    ]
    show(f"self_modifying_titans, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    against.add_option(options)
    given = options.parse_args(arguments)
    shape, repeats = QUICK if given.quick else SHAPE, given.repeats or (1 if given.quick else 10)
    if given.against is None:
        return record(measure(shape, repeats), given.json)
    checked(shape)
    figures = against.compare(given.against, [("roofline", {"shape": shape})], repeats)
    return record({"against": figures}, given.json)


if __name__ == "__main__":
    main()
