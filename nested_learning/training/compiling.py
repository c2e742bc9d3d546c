"""Training through torch.compile, where there is a working compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from nested_learning.layers import set_compile_step

BACKEND: Any = "inductor"


def compile_blocks(model: PreTrainedModel) -> bool:
    """Let the blocks of a model run through torch.compile; False, with a warning, where nothing compiles.

    The memories' chunks within them are compiled too. One graph serves all blocks that are alike, which takes
    a fraction of the time of a graph of the whole model, and what wraps the model (DDP, FSDP) or a block
    (checkpointing) finds them as they were. No name of a parameter changes.
    """
    try:
        _try_out()
    except Exception as error:  # torch raises its own for each thing that is missing
        warnings.warn(
            f"torch.compile does not work here, so training runs without: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    # DDP would cut a block's graph where its buckets end, and compile each piece, for sums over processes to
    # begin before the block's backward pass is over: they begin with each block as it is.
    torch._dynamo.config.optimize_ddp = False
    set_compile_step(model, True)
    for block in _blocks(model):
        block.compile(backend=BACKEND)
    return True


def run_plainly(model: PreTrainedModel) -> None:
    """Undo `compile_blocks`: generation would compile its own graphs for a few tokens."""
    set_compile_step(model, model.config.compile_step)
    for block in _blocks(model):
        block._compiled_call_impl = None


@contextmanager
def plain_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Blocks that run without their graphs inside the scope, for what hooks into them."""
    kept = [(block, block._compiled_call_impl) for block in _blocks(model)]
    for block, _ in kept:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, graph in kept:
            block._compiled_call_impl = graph


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(cast(nn.ModuleList, model.base_model.layers))


def _try_out() -> None:
    """Compile something small; the disk's cache of compiled code says nothing about the compiler."""
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        torch.compile(_double, backend=BACKEND)(torch.zeros(2))


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
