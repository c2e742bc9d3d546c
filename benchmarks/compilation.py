"""Layers and a training step through torch.compile against plain: `python -m benchmarks.layers training`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import forward, slopes
from benchmarks.harness import interleaved, show
from nested_learning import HopeForCausalLM
from nested_learning.layers import set_compile_step
from nested_learning.models import preset
from nested_learning.training.compiling import compile_blocks

WRITTEN_OUT = ("self_modifying_titans", "titans")
STEP = {"batch": 8, "tokens": 256, "longer": 2048}
QUICK_STEP = {"batch": 1, "tokens": 16, "longer": 32}


def first(work: Callable[[], object]) -> float:
    """Seconds of a call after all that was compiled is forgotten, as far as this process knows it."""
    torch.compiler.reset()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def layers(shape: dict[str, int], repeats: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Both passes of memory layers, compiled and plain."""
    x, rows = cases.inputs(shape), []
    for name in (name for name in WRITTEN_OUT if only is None or name in only):
        plain = cases.mixer(name, shape)
        compiled = cases.compiled(plain)
        seconds_to_compile = first(lambda f=compiled: slopes(f, x))
        fast = interleaved(
            {"plain": lambda f=plain: forward(f, x), "compiled": lambda f=compiled: forward(f, x)}, repeats
        )
        both = interleaved(
            {"plain": lambda f=plain: slopes(f, x), "compiled": lambda f=compiled: slopes(f, x)}, repeats
        )
        rows.append(
            {
                "layer": name,
                "forward, ratio": fast["plain"] / fast["compiled"],
                "forward + backward, ratio": both["plain"] / both["compiled"],
                "first pass, s": seconds_to_compile,
            }
        )
    return rows


def steps(sizes: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """A training step of hope-tiny without the optimizer: the model compiled, its blocks compiled, plain."""
    ids = {name: torch.randint(0, 256, (sizes["batch"], sizes[name])) for name in ("tokens", "longer")}
    rows = []
    for how in ("whole model", "blocks"):
        torch.manual_seed(0)
        plain, model = HopeForCausalLM(preset("hope-tiny")), HopeForCausalLM(preset("hope-tiny"))
        compiled: Callable[..., Any] = model
        if how == "blocks":
            compile_blocks(model)
        else:
            set_compile_step(model, True)
            compiled = torch.compile(model)

        def step(call: Callable[..., Any], tokens: torch.Tensor) -> None:
            call(tokens, labels=tokens, use_cache=False).loss.backward()

        longer = first(lambda f=compiled: step(f, ids["longer"]))
        shorter = first(lambda f=compiled: step(f, ids["tokens"]))
        seconds = interleaved(
            {
                "plain": lambda f=plain: step(f, ids["tokens"]),
                "compiled": lambda f=compiled: step(f, ids["tokens"]),
            },
            repeats,
        )
        rows.append(
            {
                "compiled": how,
                "plain, s": seconds["plain"],
                "compiled, s": seconds["compiled"],
                "ratio": seconds["plain"] / seconds["compiled"],
                f"first step of {sizes['tokens']}, s": shorter,
                f"first step of {sizes['longer']}, s": longer,
            }
        )
    return rows


def training(shape: dict[str, int], repeats: int, only: list[str] | None) -> dict[str, Any]:
    """Both tables; an empty TORCHINDUCTOR_CACHE_DIR is what compiling from nothing takes."""
    sizes = QUICK_STEP if shape["tokens"] < STEP["tokens"] else STEP
    torch.manual_seed(0)
    of_layers = layers(shape, repeats, only)
    if of_layers:
        show(f"layers through torch.compile, {shape}", of_layers)
    of_steps = steps(sizes, repeats)
    show(f"training step of hope-tiny, {sizes}", of_steps)
    return {"shape": shape, "sizes": sizes, "repeats": repeats, "layers": of_layers, "steps": of_steps}
