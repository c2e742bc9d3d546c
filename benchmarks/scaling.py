"""Growth of cost with the length of the sequence: `python -m benchmarks.scaling [QUESTION]`; default all.

- `attention`: a Hope block against a Transformer block of equal parameters, one training pass (forward and
  backward) over the same number of tokens at every length T; with `--compiled` also both compiled.
- `linear`: self-modifying Titans, batch 1: time of forward + backward at two lengths, and at the longer one
  time and peak extra memory with and without recomputing chunks in the backward pass. Memory is the growth
  of the peak resident set, each in a fresh process.
- `length`: a Hope of width 64 with recompute="chunk" on the first tokens of a document, forward and backward:
  read as one sequence, and by blocks with the state carried. Time (of the processor too, which other programs
  do not change), peak extra memory and gradient norm, each in a fresh process. `--lengths` names the lengths.

With `--against FOLDER` self-modifying Titans at both lengths here against another commit's.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from benchmarks import against, cases, gate
from benchmarks.cases import slopes
from benchmarks.harness import interleaved, parameters, parser, record, show
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers import SelfModifyingTitans
from nested_learning.layers.memory import set_recompute
from nested_learning.models import preset
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.training.carried import CarriedRows
from nested_learning.training.data.packing import TokenizedText
from nested_learning.training.data.stdlib import stdlib_documents
from nested_learning.training.data.streams import CarriedDataset
from nested_learning.training.memory_probe import in_fresh_process
from nested_learning.training.report import peak_rss

BLOCK = {"width": 512, "heads": 8, "chunk": 64, "tokens": 16_384}
QUICK_BLOCK = {"width": 32, "heads": 2, "chunk": 8, "tokens": 64}
LENGTHS, QUICK_LENGTHS = (512, 4096, 16_384), (16, 64)
LAYER = {"width": 256, "heads": 4, "chunk": 64}
QUICK_LAYER = {"width": 32, "heads": 2, "chunk": 8}
LONG, QUICK_LONG = (4096, 32_768), (16, 128)
COMPILED = ", compiled"
RECOMPUTE = {"keep all": None, "recompute": "chunk"}
HOPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "recompute": "chunk",
    "mixer_options": {"self_modifying_titans": {"chunk_size": 64}},
}
QUICK_HOPE = {**HOPE, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1}
BLOCK_SIZE, QUICK_BLOCK_SIZE = 2048, 64
DOCUMENT, QUICK_DOCUMENT = (8192, 32_768, 131_072), (64, 128)


def blocks(shape: dict[str, int]) -> dict[str, HopeBlock]:
    """A Hope block, and a Transformer block with an MLP so wide that it has as many parameters."""

    def config(mixer: str, levels: list[int], expansion: float) -> HopeConfig:
        return HopeConfig(
            vocab_size=2,
            hidden_size=shape["width"],
            num_hidden_layers=1,
            num_heads=shape["heads"],
            mixer=mixer,
            mixer_options={mixer: {"chunk_size": shape["chunk"]}} if mixer != "attention" else {},
            cms_levels=[{"chunk_size": size} for size in levels],
            cms_expansion=expansion,
        )

    hope = HopeBlock(config("self_modifying_titans", [512, 2048], 4.0), 0)
    with torch.device("meta"):
        one, two = (parameters(HopeBlock(config("attention", [512], e), 0)) for e in (1.0, 2.0))
    expansion = 1 + (parameters(hope) - one) / (two - one)
    return {"Hope": hope, "Transformer": HopeBlock(config("attention", [512], expansion), 0)}


def train(block: nn.Module, x: Tensor) -> None:
    """Forward and backward of one block."""
    y = block(x)[0]
    torch.autograd.grad(y.square().mean(), [x, *block.parameters()])


def attention(
    shape: dict[str, int], lengths: tuple[int, ...], repeats: int, compiling: bool = False
) -> dict[str, Any]:
    """Tokens per second of both blocks at each length, with `compiling` also through torch.compile."""
    torch.manual_seed(0)
    pair = blocks(shape)
    mixer = pair["Hope"].mixer
    assert isinstance(mixer, SelfModifyingTitans)
    gate.equals_oracle(mixer, shape["chunk"] + 9)
    suffixes = ["", COMPILED] if compiling else [""]
    all_of = {name + s: cases.compiled(b) if s else b for s in suffixes for name, b in pair.items()}
    rows = []
    for length in lengths:
        x = torch.randn(shape["tokens"] // length, length, shape["width"], requires_grad=True)
        seconds = interleaved(
            {name: lambda block=block, x=x: train(block, x) for name, block in all_of.items()}, repeats
        )
        rate = {name: shape["tokens"] / value for name, value in seconds.items()}
        rows.append(
            {
                "T": length,
                **{f"{name}, tokens/s": value for name, value in rate.items()},
                **{
                    f"Hope of Transformer{suffix}": rate[f"Hope{suffix}"] / rate[f"Transformer{suffix}"]
                    for suffix in suffixes
                },
            }
        )
    counts = {name: parameters(block) for name, block in pair.items()}
    show(f"training a block, {shape}, parameters {counts}", rows)
    return {"shape": shape, "repeats": repeats, "parameters": counts, "rows": rows}


def build_layer(shape: dict[str, int], recompute: str | None) -> SelfModifyingTitans:
    """Self-modifying Titans of this size, with or without recomputation."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    set_recompute(layer, recompute)
    return layer


def extra_memory(shape: dict[str, int], length: int, recompute: str | None) -> int:
    """Bytes by which forward + backward of a layer raise the peak resident set of this process."""
    layer = build_layer(shape, recompute)
    slopes(layer, torch.randn(1, 2 * shape["chunk"], shape["width"], requires_grad=True))  # loads libraries
    x = torch.randn(1, length, shape["width"], requires_grad=True)
    before = peak_rss()
    slopes(layer, x)
    return peak_rss() - before


def linear(shape: dict[str, int], lengths: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Time at two lengths, and the memory that recomputation saves and the time it costs at the longer."""
    layers: dict[str, nn.Module] = {name: build_layer(shape, how) for name, how in RECOMPUTE.items()}
    gate.equals_oracle(build_layer(shape, "chunk"), shape["chunk"] + 9)
    short, long = (torch.randn(1, length, shape["width"], requires_grad=True) for length in lengths)
    brief = interleaved(
        {name: lambda layer=layer: slopes(layer, short) for name, layer in layers.items()}, repeats
    )
    full = interleaved(
        {name: lambda layer=layer: slopes(layer, long) for name, layer in layers.items()}, repeats
    )
    memory = {name: in_fresh_process(extra_memory, shape, lengths[1], how) for name, how in RECOMPUTE.items()}
    rows = [
        {
            "backward pass": name,
            f"T {lengths[0]}, s": brief[name],
            f"T {lengths[1]}, s": full[name],
            "ratio of time": full[name] / brief[name],
            "time of keep all": full[name] / full["keep all"],
            "extra memory, MB": memory[name] / 1e6,
            "memory of keep all": memory[name] / max(memory["keep all"], 1),
        }
        for name in layers
    ]
    show(f"self_modifying_titans, batch 1, {shape}", rows)
    return {"shape": shape, "lengths": lengths, "repeats": repeats, "rows": rows}


def read_document(hope: dict[str, Any], length: int, block_size: int) -> dict[str, float]:
    """Forward and backward over the first tokens of a document, block by block with the state carried.

    Args:
        hope: fields of the model that differ from hope-tiny's.
        length: tokens.
        block_size: tokens that are read at once, all of them for one sequence.

    Returns:
        Seconds, those of the processor, bytes by which the peak resident set grew, the largest gradient norm
        of a block.

    Raises:
        RuntimeError: a gradient is not finite.
    """
    torch.manual_seed(0)
    model = HopeForCausalLM(preset("hope-tiny", **hope)).train()
    text = max((text for _, text in stdlib_documents()), key=len).encode()
    ids = np.frombuffer(text * (length // len(text) + 2), np.uint8)[: length + 1]
    data = CarriedDataset(TokenizedText(ids, length), block_size, 1, length // block_size)
    rows = CarriedRows(model.config)
    model(torch.zeros(1, 128, dtype=torch.long)).logits.sum().backward()  # loads libraries
    before, start, busy, norm = peak_rss(), time.perf_counter(), time.process_time(), 0.0
    for index in range(len(data)):
        model.zero_grad()
        model(**rows.enter(default_collate([data[index]]))).loss.backward()
        rows.leave()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = max(norm, float(nn.utils.get_total_norm(grads, error_if_nonfinite=True)))
    seconds = {"s": time.perf_counter() - start, "processor s": time.process_time() - busy}
    return {**seconds, "bytes": peak_rss() - before, "gradient norm": norm}


def length(hope: dict[str, Any], lengths: tuple[int, ...], block_size: int) -> dict[str, Any]:
    """Cost of a document at each length, as one sequence and by blocks with the state carried."""
    rows = []
    for way in ("sequence", "blocks"):
        for tokens in lengths:
            size = block_size if way == "blocks" else tokens
            found = in_fresh_process(read_document, hope, tokens, size)
            rows.append(
                {
                    "read as": way,
                    "T": tokens,
                    "s": found["s"],
                    "µs/token": found["s"] / tokens * 1e6,
                    "processor": found["processor s"] / tokens * 1e6,
                    "extra MB": found["bytes"] / 1e6,
                    "bytes/token": found["bytes"] / tokens,
                    "gradient": found["gradient norm"],
                }
            )
    show(f"hope-tiny with {hope}, blocks of {block_size}", rows)
    return {"hope": hope, "lengths": lengths, "block_size": block_size, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "question", choices=["attention", "linear", "length", "all"], nargs="?", default="all"
    )
    options.add_argument("--lengths", type=int, nargs="+", help="tokens of the document, of `length`")
    options.add_argument("--compiled", action="store_true", help="`attention`: also both blocks compiled")
    against.add_option(options)
    given = options.parse_args(arguments)
    repeats = given.repeats or (1 if given.quick else 5)
    if given.against is not None:
        if given.question in ("attention", "length"):
            options.error(f"argument --against: not with `{given.question}`, whose block is no public name")
        layer, lengths = (QUICK_LAYER, QUICK_LONG) if given.quick else (LAYER, LONG)
        gate.equals_oracle(build_layer(layer, None), layer["chunk"] + 9)
        case = ("scaling", {"shape": layer, "lengths": lengths})
        return record({"against": against.compare(given.against, [case], repeats)}, given.json)
    figures: dict[str, Any] = {}
    if given.question in ("attention", "all"):
        block, lengths = (QUICK_BLOCK, QUICK_LENGTHS) if given.quick else (BLOCK, LENGTHS)
        figures["attention"] = attention(block, lengths, repeats, given.compiled)
    if given.question in ("linear", "all"):
        layer, long = (QUICK_LAYER, QUICK_LONG) if given.quick else (LAYER, LONG)
        figures["linear"] = linear(layer, long, repeats)
    if given.question in ("length", "all"):
        hope, size = (QUICK_HOPE, QUICK_BLOCK_SIZE) if given.quick else (HOPE, BLOCK_SIZE)
        lengths = tuple(given.lengths or (QUICK_DOCUMENT if given.quick else DOCUMENT))
        if any(tokens < size or tokens % size for tokens in lengths):
            options.error(f"argument --lengths: expected multiples of the {size} tokens of a block")
        figures["length"] = length(hope, lengths, size)
    return record(figures, given.json)


if __name__ == "__main__":
    main()
