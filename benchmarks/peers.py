"""Against another implementation: `python -m benchmarks.peers` (needs the extra: pip install -e '.[peers]').

Forward + backward of one layer, tokens per second, beside `NeuralMemory` of titans-pytorch: the same width,
heads, chunk and two-layer memory, momentum on. With `batch_size` equal to the chunk its weights move on
after every chunk, the same algorithm as `titans`; with `batch_size=None` all its gradients are taken at the
initial weights, which is easier. `self_modifying_titans` trains five memories where the others train one.

With `--compiled` each also through torch.compile; what does not compile has no figure, and why is printed.
With `--against FOLDER` both layers here against those of another commit; the peer is not needed for it.

A gate first: our layers equal their token-by-token oracle.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import against, cases, gate
from benchmarks.cases import PEERS, slopes
from benchmarks.harness import interleaved, parameters, parser, record, show
from nested_learning.layers import SelfModifyingTitans, Titans

PEER = "titans-pytorch"
SHAPE = {"batch": 4, "tokens": 1024, "width": 256, "heads": 4, "chunk": 64}
QUICK = {"batch": 1, "tokens": 16, "width": 32, "heads": 2, "chunk": 8}
MISSING = 2  # exit status


def peer(shape: dict[str, int], batch_size: int | None) -> nn.Module:
    """The peer's memory layer at this size."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    head = shape["width"] // shape["heads"]
    return NeuralMemory(
        dim=shape["width"],
        dim_head=head,
        heads=shape["heads"],
        chunk_size=shape["chunk"],
        batch_size=batch_size,
        model=MemoryMLP(head, depth=2, expansion_factor=1.0),
        momentum=True,
    )


def checked(shape: dict[str, int]) -> dict[str, SelfModifyingTitans | Titans]:
    """Our layers at this size, each of which equals its oracle."""
    torch.manual_seed(0)
    ours = {
        name: kind(shape["width"], shape["heads"], chunk_size=shape["chunk"]) for name, kind in PEERS.items()
    }
    for layer in ours.values():
        gate.equals_oracle(layer, shape["chunk"] + 9)
    return ours


def compiled(layers: dict[str, nn.Module], x: Tensor) -> dict[str, nn.Module]:
    """Those of the layers, by "NAME, compiled", that run through torch.compile."""
    found = {}
    for name, layer in layers.items():
        try:
            slopes(candidate := cases.compiled(layer), x)
        except Exception as error:  # the peer's own or the compiler's: it has no figure
            print(f"{name} does not compile: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        found[f"{name}, compiled"] = candidate
    return found


def measure(shape: dict[str, int], repeats: int, compiling: bool = False) -> dict[str, Any]:
    """Tokens per second of our layers and the peer's, with `compiling` also through torch.compile."""
    ours = checked(shape)
    same, easier = f"{PEER}, batch_size={shape['chunk']}", f"{PEER}, batch_size=None"
    layers: dict[str, nn.Module] = {**ours, same: peer(shape, shape["chunk"]), easier: peer(shape, None)}
    x = cases.inputs(shape)
    if compiling:
        layers |= compiled(layers, x)
    seconds = interleaved(
        {name: lambda layer=layer: slopes(layer, x) for name, layer in layers.items()}, repeats
    )
    rows = [
        {
            "layer": name,
            "parameters": parameters(layer),
            "forward + backward, tokens/s": x.shape[0] * x.shape[1] / seconds[name],
            f"of {same}": seconds[same] / seconds[name],
            f"of {easier}": seconds[easier] / seconds[name],
        }
        for name, layer in layers.items()
    ]
    show(f"peers, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "peer": f"{PEER} {metadata.version(PEER)}", "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--compiled", action="store_true", help="each layer also through torch.compile")
    against.add_option(options)
    given = options.parse_args(arguments)
    shape, repeats = QUICK if given.quick else SHAPE, given.repeats or (1 if given.quick else 10)
    if given.against is not None:
        checked(shape)
        figures = against.compare(given.against, [("peers", {"shape": shape})], repeats)
        return record({"against": figures}, given.json)
    try:
        metadata.version(PEER)
    except metadata.PackageNotFoundError:
        print(f"{PEER} is not installed: pip install -e '.[peers]'", file=sys.stderr)
        sys.exit(MISSING)
    return record(measure(shape, repeats, given.compiled), given.json)


if __name__ == "__main__":
    main()
