"""The optimizer and the learning-rate schedule of a configuration, for `train`, `adapt` and `compare`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nested_learning.optimizers import build
from nested_learning.optimizers.recipe import by_name, is_adam, options_of
from nested_learning.training.config import DEFAULT_WARMUP, OptimConfig
from nested_learning.training.process import process_state

# Arguments of `build` that are no options of an optimizer.
BUILT = ("name", "model", "lr", "weight_decay", "levels", "tokens_per_row", "max_grad_norm", "adamw")
NOT_IN_RUNS = {
    "lbfgs": "needs a function that computes the loss anew, which a run does not have",
    "sparseadam": "takes sparse gradients alone, which these models do not have",
}


def build_optimizer(model: nn.Module, config: OptimConfig, tokens_per_row: int | None = None) -> Optimizer:
    """The optimizer of a run; see `nested_learning.optimizers.build`.

    Args:
        model: the model to train.
        config: its optimizers.
        tokens_per_row: tokens of a row, for levels with the period "chunk".

    Raises:
        ValueError: the configuration does not fit the model, or an optimizer cannot be used in a run.
    """
    names = [config.name, *(level.get("name", config.name) for level in config.levels)]
    for name in names:
        if str(name).lower() in NOT_IN_RUNS:
            raise ValueError(f"{name} {NOT_IN_RUNS[str(name).lower()]}; choose another --optim.name")
    if own := sorted(set(BUILT) & config.options.keys()):
        raise ValueError(f"optim.options has {own[0]!r}; expected other options of {config.name} alone")
    options = [config.options, *config.levels]
    if any(each.get("capturable") for each in options) and process_state().device.type == "cpu":
        raise ValueError("capturable is for steps within CUDA graphs, got it on a CPU: leave it out")
    adamw = {"betas": tuple(config.betas), "eps": config.eps}
    known = by_name()
    users = [known[str(name).lower()] for name in names if str(name).lower() in known]
    if not any(is_adam(cls) or "adamw_betas" in options_of(cls) for cls in users):
        default = OptimConfig()
        if adamw != {"betas": default.betas, "eps": default.eps}:
            raise ValueError(
                f"optim.betas and optim.eps are AdamW's, which {config.name} does without; leave them out, "
                "or give options of its own as optim.options"
            )
    return build(
        config.name,
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        levels=config.levels,
        tokens_per_row=tokens_per_row,
        max_grad_norm=(config.max_grad_norm or None) if config.levels else None,
        adamw=adamw,
        **config.options,
    )


def rehearse(
    config: PreTrainedConfig, optim: OptimConfig, tokens_per_row: int, steps: int | None = None
) -> tuple[nn.Module, Optimizer]:
    """A model without memory for its weights, and its optimizer; what is wrong is refused before any work.

    Warns of levels that would not make one of the run's `steps`, where these are known.

    Raises:
        ValueError: as `build_optimizer`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    optimizer = build_optimizer(model, optim, tokens_per_row)
    if steps is not None:
        _warn_of_periods(optimizer, steps)
    return model, optimizer


def _warn_of_periods(optimizer: Optimizer, steps: int) -> None:
    """Warn of levels that would not make one step in a run of `steps` optimizer steps."""
    periods = {group.get("name"): group.get("period", 1) for group in optimizer.param_groups}
    if late := {name: period for name, period in periods.items() if period > steps}:
        told = ", ".join(f"{name} (period {period})" for name, period in late.items())
        warnings.warn(
            f"levels that stay as they are, as the run has {steps} steps: {told}. Train longer, or lower "
            "their periods",
            RuntimeWarning,
            stacklevel=3,
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


def build_schedule(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """The schedule of a run of `steps` optimizer steps as a torch scheduler, stepped once per step."""
    return LambdaLR(optimizer, lr_factor(config, steps))
