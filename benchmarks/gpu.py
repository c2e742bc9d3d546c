"""Speed on a GPU: `python -m benchmarks.gpu [layers|decode|all]`; `make gpu` runs it after the tests there.

- `layers`: forward + backward of a layer in float32, in TF32 and under bfloat16 autocast, plainly and
  compiled (`set_compile_step`; attention as a whole), with chunks of 64 and of 128, beside attention by
  torch's kernels and, where flash-linear-attention is installed, matrix memories by its kernels. Tokens per
  second, peak memory, and for self-modifying Titans the share of a torch.mm in the same precision.
- `decode`: greedy tokens per second, batch 1: plainly, compiled, and compiled with CUDA graphs.

`--only NAME ...` chooses layers; `--plain` leaves out what has to be compiled first, which takes minutes.
`--device cpu --quick` shows that it runs; the figures mean nothing then.
A gate first: each memory layer of the paper equals its token-by-token oracle on the device.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, gate
from benchmarks.cases import PEERS, Session, slopes
from benchmarks.harness import interleaved, parser, record, show
from benchmarks.roofline import operations
from nested_learning.layers import MemoryLayer, set_compile_step
from nested_learning.memory.engines import fla

SHAPE = {"batch": 8, "tokens": 2048, "width": 1024, "heads": 16}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2}
CHUNKS, QUICK_CHUNKS = (64, 128), (8,)
LAYERS = (
    "self_modifying_titans",
    "titans",
    "linear_attention",
    "deltanet",
    "gated_deltanet",
    "retnet",
    "attention",
)
PRECISIONS = ("float32", "tf32", "bf16")
SIDE, QUICK_SIDE = 8192, 64  # width of the square matrices of the torch.mm
MODELS = ("hope-tiny", "transformer-tiny")
CONTEXTS, QUICK_CONTEXTS = (128, 16_384), (8,)
MODES = {"compiled": "default", "CUDA graphs": "reduce-overhead"}
MISSING = 2  # exit status


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Products in float32, in TF32 or under bfloat16 autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    autocast: AbstractContextManager[object] = nullcontext()
    if name == "bf16":
        autocast = torch.autocast(device.type, torch.bfloat16)
    try:
        with autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def wait_for(device: torch.device) -> Callable[[], object]:
    """What waits until the device has done what was asked of it."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def product_rate(name: str, device: torch.device, side: int, repeats: int) -> float:
    """Floating-point operations per second of a square torch.mm in this precision."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = interleaved({"mm": lambda: torch.mm(a, b)}, repeats, warmup=3, wait=wait_for(device))["mm"]
    return 2 * side**3 / seconds


def variants(name: str, shape: dict[str, int], device: torch.device, compiling: bool) -> dict[str, nn.Module]:
    """A layer plainly, compiled, and by the kernels of flash-linear-attention where it has them."""
    plain = cases.mixer(name, shape).to(device)
    found = {"plain": plain}
    if isinstance(plain, MemoryLayer):
        plain.backend = "torch"
        if fla.covers(plain.system) and fla.installed() and device.type == "cuda":
            found["fla"] = copy.deepcopy(plain)
            found["fla"].backend = "fla"  # type: ignore[assignment]
    if compiling:
        compiled = copy.deepcopy(plain)
        if isinstance(compiled, MemoryLayer):
            set_compile_step(compiled, True)
            found["compiled"] = compiled
        else:
            found["compiled"] = torch.compile(compiled)  # type: ignore[assignment]
    return found


def one_layer(
    name: str, layers: dict[str, nn.Module], shape: dict[str, int], repeats: int, rates: dict[str, float]
) -> list[dict[str, object]]:
    """Rows of one layer with one length of chunk."""
    device = next(layers["plain"].parameters()).device
    x = torch.randn(shape["batch"], shape["tokens"], shape["width"], device=device, requires_grad=True)
    rows: list[dict[str, object]] = []
    for kind in PRECISIONS:
        with precision(kind, device):
            works = {how: lambda layer=layer: slopes(layer, x) for how, layer in layers.items()}
            seconds = interleaved(works, repeats, warmup=2, wait=wait_for(device))
            for how, work in works.items():
                rows.append(
                    {
                        "layer": name,
                        "chunk": None if name == "attention" else shape["chunk"],
                        "precision": kind,
                        "how": how,
                        "forward + backward, tokens/s": shape["batch"] * shape["tokens"] / seconds[how],
                        "peak memory, MB": peak_memory(work, device),
                        "of torch.mm": 3 * operations(shape) / seconds[how] / rates[kind]
                        if name == "self_modifying_titans"
                        else None,
                    }
                )
    return rows


def peak_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that a call of `work` adds to what is allocated, at most; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def layers(
    device: torch.device, quick: bool, repeats: int, names: Sequence[str], compiling: bool
) -> dict[str, Any]:
    """The table of layers."""
    shape, chunks = (QUICK, QUICK_CHUNKS) if quick else (SHAPE, CHUNKS)
    torch.manual_seed(0)
    for kind in PEERS.values():
        small = kind(64, 2, chunk_size=16).to(device)
        gate.equals_oracle(small, 41)
    rates = dict.fromkeys(PRECISIONS, 0.0)
    for kind in PRECISIONS:
        with precision(kind, device):
            rates[kind] = product_rate(kind, device, QUICK_SIDE if quick else SIDE, repeats)
    rows: list[dict[str, object]] = []
    for name in names:
        for chunk in chunks[:1] if name == "attention" else chunks:
            size = {**shape, "chunk": chunk}
            torch.manual_seed(0)
            rows += one_layer(name, variants(name, size, device, compiling), size, repeats, rates)
    show(f"layers, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "product rate": rates, "rows": rows}


class CopyingSession(Session):
    """A session that takes its states out of the memory that the next run of a CUDA graph writes to."""

    @torch.no_grad()
    def next(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().next()
        self.newest, self.cache = self.newest.clone(), self.cache.map(Tensor.clone)


def decode(device: torch.device, quick: bool, tokens: int, compiling: bool) -> dict[str, Any]:
    """The table of generation."""
    rows: list[dict[str, object]] = []
    for name in MODELS:
        model = cases.language_model(name).to(device)
        for context in QUICK_CONTEXTS if quick else CONTEXTS:
            ids = torch.randint(256, (1, context), device=device)
            sessions = {"plain": Session(model, ids)}
            for how, mode in MODES.items() if compiling else ():
                sessions[how] = CopyingSession(model, ids)
                sessions[how].call = torch.compile(model, mode=mode)  # type: ignore[assignment]
            seconds = interleaved(
                {how: session.next for how, session in sessions.items()},
                tokens,
                warmup=4,
                wait=wait_for(device),
            )
            rows.append(
                {
                    "model": name,
                    "context": context,
                    **{f"{how}, tokens/s": 1 / value for how, value in seconds.items()},
                }
            )
            torch.compiler.reset()
    show("generation, batch 1", rows)
    return {"tokens": tokens, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["layers", "decode", "all"], nargs="?", default="all")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these layers alone", choices=LAYERS)
    options.add_argument("--plain", action="store_true", help="nothing that has to be compiled first")
    options.add_argument("--check", action="store_true", help="only say whether there is such a device")
    options.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    given = options.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device, or this build of PyTorch cannot use it", file=sys.stderr)
        sys.exit(MISSING)
    if given.check:
        return {}
    repeats = given.repeats or (1 if given.quick else 10)
    figures: dict[str, Any] = {}
    if given.question in ("layers", "all"):
        figures["layers"] = layers(device, given.quick, repeats, given.only or LAYERS, not given.plain)
    if given.question in ("decode", "all"):
        tokens = given.repeats or (1 if given.quick else 100)
        figures["decode"] = decode(device, given.quick, tokens, not given.plain)
    return record(figures, given.json, device)


if __name__ == "__main__":
    main()
