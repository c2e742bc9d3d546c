"""Train one step of copied or sharded models in each process, and compare with the model in one piece.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.models.fsdp_worker CASE ... [WAY compiled]

Prints one JSON line: by case and way of sharding the largest difference, or the error.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nested_learning import HopeForCausalLM
from nested_learning.memory.engines import compiler
from nested_learning.training import compiling
from nested_learning.training.compiling import compile_blocks
from tests.ecosystem.tiny_hope import hope, ids

COMPILED = "compiled"  # the blocks run through torch.compile
WAYS = ("ddp", "model", "blocks", "parts", "fsdp1", "fsdp1 blocks")


def shard(model: HopeForCausalLM, way: str) -> torch.nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp1 blocks":
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = FullyShardedDataParallel(
                block, device_id=torch.device("cpu"), use_orig_params=True
            )
    if way.startswith("fsdp1"):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if way == "blocks":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard([model.model.norm, model.lm_head])
    if way == "parts":
        for block in model.model.layers:
            fully_shard(block.mixer)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(case: str, way: str) -> float:
    """The largest difference in loss and gradients, after the second of two steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = hope(case, tie_word_embeddings=False).train()
    text = ids(2 * world)
    mask = torch.ones_like(text)
    mask[::2, :3] = 0  # as many tokens in each process
    labels = text.masked_fill(mask == 0, -100)
    wanted = plain(text, attention_mask=mask, labels=labels).loss
    wanted.backward()
    copied = copy.deepcopy(plain)
    if COMPILED in sys.argv:
        assert compile_blocks(copied)
    sharded = shard(copied, way)
    rows = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        sharded.zero_grad()
        loss = sharded(text[rows], attention_mask=mask[rows], labels=labels[rows]).loss
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = float((total / world - wanted.detach()).abs())
    gathered = nullcontext()
    if way.startswith("fsdp1"):
        gathered = FullyShardedDataParallel.summon_full_params(sharded, with_grads=True)
    with gathered:
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                worst = max(worst, float((whole(p.grad) - q.grad).abs().max()))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    compiling.BACKEND = compiler.BACKEND = "aot_eager"  # generated code takes minutes
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    found: dict[str, float | str] = {}
    chosen = [argument for argument in sys.argv[1:] if argument in WAYS] or WAYS
    for case in (argument for argument in sys.argv[1:] if argument not in (*WAYS, COMPILED)):
        for way in chosen:
            try:
                found[f"{case}, {way}"] = step(case, way)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                found[f"{case}, {way}"] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
