"""AdamW's parameter groups and the learning-rate schedule, shared by `train` and `compare`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nested_learning.training.config import DEFAULT_WARMUP, OptimConfig


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that get weight decay: matrices that are weights of an ordinary map.

    Not decayed: 1-D parameters (biases, norms, gate vectors), embeddings (a tied head is one), and the
    initial states of memories (`*.initial.*`): decaying those would pull every sequence's starting point
    to zero, and the memories' rule already has its own retention.
    """
    embeddings = {
        f"{name}.{local}" if name else local
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for local, _ in module.named_parameters(recurse=False)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim >= 2
        and name not in embeddings
        and "initial" not in name.split(".")
    }


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups: with weight decay (see `decayed_names`) and without."""
    decayed = decayed_names(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, … `steps` - 1 as a fraction of the peak.

    Linear warm-up that reaches 1 at its last step, then a cosine or a straight line that would reach
    `final_lr_fraction` at step `steps`.
    """
    warmup = config.warmup(steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return decayed(config, (step - warmup) / max(1, steps - warmup))

    return factor


def decayed(config: OptimConfig, done: float) -> float:
    """The learning rate after the share `done` of the steps, or of the time, that follow warm-up."""
    done = min(1.0, done)
    decay = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * decay


def warmed_up(config: OptimConfig, step: int, used: float) -> float:
    """The learning rate of a step in the warm-up of a run whose steps nobody knows; 1 and more behind it.

    Args:
        config: the schedule. Its `warmup_steps` end by half of the time at the latest, where they are left
            open (50) by a quarter of it: a rate that never got up would be no schedule.
        step: steps before this one.
        used: share of the time that is used up.
    """
    steps, latest = (DEFAULT_WARMUP, 0.25) if config.warmup_steps is None else (config.warmup_steps, 0.5)
    return max((step + 1) / steps, used / latest) if steps else 1.0


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """The schedule of a run of `steps` optimizer steps as a torch scheduler, stepped once per step."""
    return LambdaLR(optimizer, lr_factor(config, steps))
