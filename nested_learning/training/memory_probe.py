"""The memory of a training step, measured where nothing else has allocated any: in a fresh process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from nested_learning._workers import at_work, end_with_parent, interrupts_held
from nested_learning.models import HopeConfig, HopeForCausalLM
from nested_learning.training.config import OptimConfig
from nested_learning.training.optim import build_optimizer
from nested_learning.training.report import peak_rss

Result = TypeVar("Result")

STEPS = 2  # the second one has the optimizer's state too


def step_memory(
    config: dict[str, Any], shape: tuple[int, int], device: str, optim: OptimConfig | None = None
) -> int:
    """Bytes that a model, its gradients, its optimizer and a training step's activations need at most.

    On a GPU the peak of allocated tensors. On a CPU the growth of the process's peak resident set from
    just before the model is built, as the operating system counts it, allocator and libraries included.

    Args:
        config: `HopeConfig.to_dict()` of the model.
        shape: (sequences, tokens) of the batch.
        device: the device to train on.
        optim: the optimizer; default: AdamW.
    """
    return in_fresh_process(_measure, config, shape, device, optim or OptimConfig())


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function at module level, called in a process that has done nothing before."""
    context = multiprocessing.get_context("spawn")
    with at_work(ProcessPoolExecutor(1, context, end_with_parent)) as pool:
        with interrupts_held():
            future = pool.submit(function, *arguments)
        return future.result()


def _measure(config: dict[str, Any], shape: tuple[int, int], device: str, optim: OptimConfig) -> int:
    before = peak_rss()
    model = HopeForCausalLM(HopeConfig.from_dict(config)).to(device).train()  # type: ignore[arg-type]
    optimizer = build_optimizer(model, optim, shape[1])
    for _ in range(STEPS):
        ids = torch.randint(model.config.vocab_size, shape, device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss() - before
