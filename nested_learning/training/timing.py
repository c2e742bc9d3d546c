"""The number of optimizer steps that fit into a time limit: measured before training, then fixed."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import PreTrainedModel

from nested_learning.training.config import TrainConfig

MEASURED = 0.04  # share of the time limit that is spent on measuring
MARGIN = 0.95  # the optimizer, checkpoints and logging take a few percent that are not measured


def measure(model: PreTrainedModel, config: TrainConfig, micro: int, budget: float) -> tuple[float, float]:
    """(seconds of forward and backward, seconds of an evaluating forward) of `micro` random sequences.

    Takes about `budget` seconds, so that a moment in which the machine is busy does not decide. Leaves the
    parameters, their gradients and the random state as they were.
    """
    device = next(model.parameters()).device
    vocab_size: int = model.config.vocab_size
    ids = torch.zeros(micro, config.data.block_size, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        ids.random_(vocab_size)

        def forward() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                return model(input_ids=ids, labels=ids).loss

        def train_step() -> None:
            forward().backward()

        def evaluate() -> None:
            with torch.no_grad():
                forward()

        was_training = model.training
        model.train()
        step = _seconds(train_step, device, budget)
        model.eval()
        evaluation = _seconds(evaluate, device, budget / 3)
        model.train(was_training)
    model.zero_grad(set_to_none=True)
    return step, evaluation


def _seconds(work: Callable[[], None], device: torch.device, budget: float) -> float:
    """The median time of a call, after one to warm up: of three calls, or of as many as `budget` s allow."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < budget:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def steps_within(
    minutes: float, step_seconds: float, eval_seconds: float, eval_every: int | None, evals: int
) -> int:
    """Optimizer steps that fit into the time, evaluations included; at least 1.

    Args:
        minutes: the time limit.
        step_seconds: seconds of one optimizer step.
        eval_seconds: seconds of one evaluation; there is one before training.
        eval_every: steps between evaluations, or None where there are `evals` of them after the first.
        evals: evaluations after the first, where `eval_every` is None.
    """
    budget = minutes * 60 * MARGIN - eval_seconds
    if eval_every is None:
        return max(1, int((budget - evals * eval_seconds) / step_seconds))
    return max(1, int(budget / (step_seconds + eval_seconds / eval_every)))
