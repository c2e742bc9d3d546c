"""Parameters that lie in shards over processes (DTensor), as torch.distributed.fsdp.fully_shard leaves them.

An optimizer's rule sees plain tensors: `working` gives it the gradients and the states of some parameters
either as this process's shards, for rules that act on each element by itself, or whole, and takes the states
back into shards afterwards. Every process then does the same arithmetic on the same whole matrix, and keeps
its own part of the result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Any) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, whose numbers lie in shards or as copies over processes."""
    loaded = sys.modules.get("torch.distributed.tensor")  # half a second to import, and there first
    return loaded is not None and isinstance(t, loaded.DTensor)


def local(t: Tensor) -> Tensor:
    """This process's shard, which shares the memory of `t`; a plain tensor itself."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of the tensor, gathered from the processes, which all have to call this; a plain one itself."""
    return t.full_tensor() if is_sharded(t) else t


def like(p: Tensor, t: Tensor, complete: bool) -> Tensor:
    """`t` with the shards of the parameter `p`. Nothing is sent.

    Args:
        p: a sharded parameter.
        t: this process's shard of the result, or where `complete` all of it, the same in all processes.
        complete: which of the two `t` is.
    """
    from torch.distributed.tensor import DTensor, Replicate

    assert is_sharded(p)
    mesh, placements = p.device_mesh, p.placements
    if complete:
        copies = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
        # A shard may be a view of the whole, which would then stay in memory.
        t = copies.redistribute(mesh, placements).to_local().clone()
    return DTensor.from_local(t, mesh, placements, run_check=False, shape=p.shape, stride=p.detach().stride())


def aligned(p: Tensor, g: Tensor) -> Tensor:
    """The gradient with the shards of its parameter, wherever its sum over processes is still to be taken."""
    if is_sharded(p) and is_sharded(g) and g.placements != p.placements:
        return g.redistribute(p.device_mesh, p.placements)
    return g


def agreed(tensors: Sequence[Tensor], flags: Tensor) -> Tensor:
    """Whether each flag is set in all processes that hold a shard of one of the tensors.

    Args:
        tensors: of which the flags tell; where none is sharded nothing is asked of other processes.
        flags: [N], bool.
    """
    groups = {group for t in tensors if is_sharded(t) for group in t.device_mesh.get_all_groups()}
    if not groups:
        return flags
    # By name, so that all processes ask in one order.
    numbers = flags.to(torch.int32)
    for group in sorted(groups, key=lambda group: group.group_name):
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group)
    return numbers.bool()


@contextmanager
def working(states: dict[Tensor, dict[str, Any]], params: Sequence[Tensor], complete: bool) -> Iterator[None]:
    """Within the block the states of the sharded ones among `params` hold plain tensors.

    Afterwards every entry of the shape that a parameter had within has that parameter's shards: also one
    that is of that shape by chance, which is whole again at the next step.

    Args:
        states: by parameter the entries of its state.
        params: the parameters whose rule runs within.
        complete: all of each tensor, else this process's shard.
    """
    sharded = [p for p in params if is_sharded(p)]
    for p in sharded:
        for name, value in states.get(p, {}).items():
            if is_sharded(value):
                states[p][name] = whole(value) if complete else local(value)
            elif not complete and isinstance(value, Tensor) and value.ndim and value.shape == p.shape:
                states[p][name] = local(like(p, value, True))  # of a file that was written in one piece
    try:
        yield
    finally:
        for p in sharded:
            shape = p.shape if complete else local(p).shape
            for name, value in states.get(p, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape == shape:
                    states[p][name] = like(p, value, complete)
