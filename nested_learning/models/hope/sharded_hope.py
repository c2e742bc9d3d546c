"""Weights of blocks whose forward pass is wrapped: FSDP makes them whole for that pass alone.

A model that learns from the next-token loss needs them between the passes of its blocks too, and runs blocks
within its own forward pass of which no backward pass of the training step may know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nested_learning.layers.token_inputs import RMSNorm
from nested_learning.models.hope.block_hope import HopeBlock


def inside(block: nn.Module, function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """`function(x)`, which reads weights of the block; run as its forward pass where that is wrapped.

    Tensors of the result are copies there, since the weights are taken away again.
    """
    if type(block) is HopeBlock:
        return function(x)

    def copied(x: Tensor) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.clone, function(x))

    # Not the class's own call, which would recompute the function where activations are checkpointed.
    return nn.Module.__call__(block, x, within=copied)


def check_passes(blocks: Sequence[nn.Module], documents: object | None) -> None:
    """Refuse sharded blocks where the number of passes through them follows from documents in the rows.

    Processes would gather weights in different numbers, and wait for each other for ever.

    Raises:
        ValueError: blocks wrapped by FSDP are to read documents in a row, chunk by chunk.
    """
    if documents is None or all(type(block) is HopeBlock for block in blocks):
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(block, FSDPModule) for block in blocks):
        raise ValueError(
            "cms_update='lm' passes through its blocks as often as the documents of its rows have chunks, so "
            "that processes would gather the weights of sharded blocks in different numbers: do not shard "
            "blocks (fully_shard the model alone), or give rows of one document"
        )


@contextmanager
def gathered(modules: Sequence[nn.Module], exact: bool) -> Iterator[bool]:
    """Make the weights of modules whole within the block; whether any were sharded.

    Those that were are called by `forward` within it, past the hooks of FSDP, which would take a gradient
    within the forward pass for the backward pass of the training step.

    Args:
        modules: everything that runs within.
        exact: the gradients that are taken within are to be differentiated again.

    Raises:
        ValueError: for modules wrapped by FSDP1, and for exact gradients of sharded ones.
    """
    if all(type(module) in (HopeBlock, nn.Linear, RMSNorm) for module in modules):
        yield False
        return
    # Imported already, where something is sharded; else half a second.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "cms_update='lm' needs the weights between the passes of its blocks, which blocks in "
            "FullyShardedDataParallel cannot give: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    if sharded and exact:
        raise ValueError(
            "cms_meta_gradient='exact' differentiates gradients of the blocks again, for which their weights "
            "must stay whole: do not shard blocks (fully_shard the model alone), or use 'first_order'"
        )
    for module in sharded:
        module.unshard()
    try:
        yield bool(sharded)
    finally:
        for module in sharded:
            module.reshard()
