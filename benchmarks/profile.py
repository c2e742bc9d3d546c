"""Shares of the time by kind of operator: `python -m benchmarks.profile [titans|roofline|long|all]`.

The cases are those of the benchmarks that compare: `titans`, forward + backward, of `peers`; `roofline`, the
forward pass of `roofline`; `long`, a training step of the Hope block of `scaling attention` at the longest
sequence. For each the share of its time in matrix products, in passes over memory (elementwise operations,
sums, copies) and outside of operators, the rate of the products, and the least time that they would take at
the rate of a 1024³ torch.mm of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import peers, roofline, scaling
from benchmarks.cases import forward, slopes
from benchmarks.harness import interleaved, parser, record, show
from nested_learning.layers import SelfModifyingTitans, Titans

aten = torch.ops.aten
KINDS = {
    "products": {"mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_scaled_dot_product_flash_attention_for_cpu"},
    "sums": {"sum", "mean", "cumsum", "linalg_vector_norm"},
    "copies": {"copy_", "cat", "fill_", "zero_", "index", "index_select", "flip"},
}
OUTSIDE = "outside of operators"


def _layer(kind: type[Any], shape: dict[str, int]) -> tuple[torch.nn.Module, torch.Tensor]:
    """A layer and inputs for it."""
    torch.manual_seed(0)
    layer = kind(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    return layer, torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)


def cases(quick: bool) -> dict[str, Callable[[], object]]:
    """The work of each case."""
    layer, x = _layer(Titans, peers.QUICK if quick else peers.SHAPE)
    wide, x_wide = _layer(SelfModifyingTitans, roofline.QUICK if quick else roofline.SHAPE)
    shape = scaling.QUICK_BLOCK if quick else scaling.BLOCK
    block = scaling.blocks(shape)["Hope"]
    x_long = torch.randn(1, shape["tokens"], shape["width"], requires_grad=True)
    return {
        "titans": lambda: slopes(layer, x),
        "roofline": lambda: forward(wide, x_wide),
        "long": lambda: scaling.train(block, x_long),
    }


class _Counter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and attention, by torch's own formulas.

    torch's own FlopCounterMode follows modules by hooks, which fail where gradients go to leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        packet = aten.baddbmm if packet == aten.baddbmm_ else packet
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that run."""
    with _Counter() as counter:
        work()
    return counter.operations


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of operator, of one call under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    seconds = dict.fromkeys(["products", "elementwise", "sums", "copies", OUTSIDE], 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "elementwise")
        seconds[kind if event.key.startswith("aten::") else OUTSIDE] += 1e-6 * event.self_cpu_time_total
    return seconds


def measure(names: list[str], quick: bool, repeats: int) -> dict[str, Any]:
    """Time, shares by kind of operator and rate of the products, of each case."""
    side = 64 if quick else roofline.SIDE
    a, b = torch.randn(2, side, side)
    works = {name: work for name, work in cases(quick).items() if name in names}
    seconds = interleaved({"torch.mm": lambda: torch.mm(a, b), **works}, repeats)
    peak = 2 * side**3 / seconds.pop("torch.mm")
    rows = []
    for name, work in works.items():
        work_done, parts = operations(work), shares(work)
        total = sum(parts.values())
        rows.append(
            {
                "case": name,
                "ms": 1e3 * seconds[name],
                **{f"{kind}, %": 100 * value / total for kind, value in parts.items()},
                "products, GFLOP": 1e-9 * work_done,
                "their rate of torch.mm's": work_done * total / (parts["products"] * seconds[name] * peak),
                "at torch.mm's rate, of the time": work_done / peak / seconds[name],
            }
        )
    show(f"where the time goes; torch.mm {1e-9 * peak:.0f} GFLOP/s", rows)
    return {"torch.mm, GFLOP/s": 1e-9 * peak, "repeats": repeats, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    names = ["titans", "roofline", "long"]
    options.add_argument("case", choices=[*names, "all"], nargs="?", default="all")
    given = options.parse_args(arguments)
    chosen = names if given.case == "all" else [given.case]
    repeats = given.repeats or (1 if given.quick else 5)
    return record(measure(chosen, given.quick, repeats), given.json)


if __name__ == "__main__":
    main()
