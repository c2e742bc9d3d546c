"""Training of a model on a synthetic task: batches of ids and targets, AdamW, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from nested_learning.evals.methods.models import TrainedModel
from nested_learning.training.process import process_state

IGNORED = -100  # a target that is not scored


class TaskBatch(NamedTuple):
    """Sequences and what is asked at each place.

    Attributes:
        ids: [B, T] int64.
        targets: [B, T] int64: the answer at each place (not shifted), IGNORED where nothing is asked.
    """

    ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Training:
    """Length and optimizer of a training.

    Args:
        steps: optimizer steps.
        lr: peak learning rate; after a warm-up it falls as a cosine to a tenth.
        weight_decay: AdamW's.
        warmup: share of the steps.
        clip: largest norm of the whole gradient.
    """

    steps: int
    lr: float
    weight_decay: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0


class Diverged(Exception):
    """The loss is NaN or infinite."""


def fit(
    method: TrainedModel,
    model: nn.Module,
    batches: Iterator[TaskBatch],
    training: Training,
    on_step: Callable[[int, float], bool] = lambda step, loss: False,
) -> list[float]:
    """Train a model in place.

    Args:
        method: gives the optimizer; the setting `lr` replaces the training's.
        model: with `model(ids).logits`.
        batches: at least as many as steps.
        training: length and optimizer.
        on_step: called with the step's number, from 1, and its loss; True ends the training.

    Returns:
        The loss of each step, in nats per scored place.

    Raises:
        Diverged: the loss is not finite.
    """
    device = process_state().device
    model.to(device).train()
    lr = float(method.settings.get("lr", training.lr))
    optimizer = method.optimizer(model, lr, training.weight_decay)
    schedule = LambdaLR(optimizer, lambda step: _factor(step, training))
    losses = []
    for step in range(1, training.steps + 1):
        batch = next(batches)
        loss = cross_entropy(model, batch, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss of step {step} is {value} at a learning rate of {lr:g}")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(value)
        if on_step(step, value):
            break
    return losses


def cross_entropy(model: nn.Module, batch: TaskBatch, device: torch.device) -> Tensor:
    """Mean loss over the places that are asked, in nats, float32."""
    logits = logits_of(model, batch.ids.to(device))
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.to(device).flatten(), ignore_index=IGNORED
    )


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of a model without a cache."""
    logits: Tensor = model(ids).logits if not _takes_cache(model) else model(ids, use_cache=False).logits
    return logits


def _takes_cache(model: nn.Module) -> bool:
    return hasattr(model, "generation_config")


@torch.no_grad()
def answers(model: nn.Module, ids: Tensor) -> Tensor:
    """The most probable id at each place [B, T], on the CPU."""
    return logits_of(model.eval(), ids.to(process_state().device)).argmax(-1).cpu()


def _factor(step: int, training: Training) -> float:
    warmup = max(1, round(training.warmup * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameters_of(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def summary(losses: list[float], points: int = 50) -> list[list[Any]]:
    """A curve of at most `points` means (step, loss) for plots."""
    size = max(1, math.ceil(len(losses) / points))
    pieces = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[start * size + len(piece), sum(piece) / len(piece)] for start, piece in enumerate(pieces)]
