"""The process that runs, alone or as one of several, and a model that lies in pieces over all of them."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def process_state() -> PartialState:
    """accelerate's state of this process: device, index, number of processes.

    accelerate joins processes on CPUs only where it is told that they are on CPUs; a plain `PartialState()`
    takes each of them for the main and only one.

    Raises:
        ValueError: FSDP is asked for in another version than 2.
    """
    if shards_asked_for() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            f"FSDP {os.environ.get('FSDP_VERSION', '1')} is asked for, expected 2: set fsdp_version: 2 in "
            "the configuration of accelerate, as configs/accelerate/fsdp2.yaml has it"
        )
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def shards_asked_for() -> bool:
    """Whether `accelerate launch` was told to cut the parameters into shards, one for each process."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def settle_shards(accelerator: Accelerator) -> None:
    """Where FSDP is asked for: shards in float32 on every device.

    accelerate gives processes on CPUs DDP instead, and under bf16 would take the forward pass with parameters
    rounded to bfloat16, also those of norms, decays and initial states; autocast does what it does elsewhere.
    """
    if shards_asked_for() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def shard_as_one(accelerator: Accelerator) -> None:
    """Where FSDP is asked for: one group of shards for the whole model in place of one for each block.

    A model that learns from the next-token loss passes through its blocks as often as its rows have chunks
    and documents. Blocks that are whole for a pass each would be gathered as often, in one process more often
    than in another, which would wait for ever.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.auto_wrap_policy = None


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model in one piece: itself, or a copy on the CPU of one that lies in shards.

    All processes have to call it. The copy is the main process's; the others get the model as it is.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not PartialState().is_main_process:
        return model
    plain = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    whole: PreTrainedModel = plain(model.config)
    whole.load_state_dict(weights)
    return whole
