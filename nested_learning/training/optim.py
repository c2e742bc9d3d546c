"""AdamW's parameter groups and the learning-rate schedule, shared by `train` and `compare`."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nested_learning.optimizers import build
from nested_learning.training.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW with two parameter groups: with weight decay (see `decayed_names`) and without."""
    return build(
        "adamw", model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps
    )


def lr_factor(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, … `steps` - 1 as a fraction of the peak.

    Linear warm-up that reaches 1 at its last step, then a cosine or a straight line that would reach
    `final_lr_fraction` at step `steps`.
    """
    warmup = config.warmup(steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        decay = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * decay

    return factor


def build_schedule(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """The schedule of a run of `steps` optimizer steps as a torch scheduler, stepped once per step."""
    return LambdaLR(optimizer, lr_factor(config, steps))
