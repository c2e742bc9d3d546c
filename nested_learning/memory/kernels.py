"""Matrix memories on a GPU by the kernels of flash-linear-attention, where that package is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from nested_learning.memory.description import MemorySystem
from nested_learning.memory.objective import L2, Dot
from nested_learning.memory.signals import StepInputs, generate_signals
from nested_learning.memory.step import RunningWeights

Backend = Literal["auto", "torch", "fla"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@cache
def installed() -> bool:
    """Whether flash-linear-attention can be imported."""
    return importlib.util.find_spec("fla") is not None


def covers(system: MemorySystem) -> bool:
    """Whether there is a kernel for this memory: a matrix with gradients at every token, no momentum, GD."""
    return (
        system.exact
        and not system.transposed
        and not system.momentum
        and not any(rule.erase for rule in system.rule.values())
        and isinstance(system.objective, Dot | L2)
    )


def check_backend(backend: str, system: MemorySystem) -> None:
    """Raise unless `backend` exists and can run the memory.

    Raises:
        ValueError: for an unknown name, or "fla" for a memory without a kernel.
        ImportError: for "fla" where the package is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend != "fla":
        return
    if not covers(system):
        raise ValueError("backend='fla' has no kernel for this memory; use backend='torch' or 'auto'")
    if not installed():
        raise ImportError(
            "backend='fla' needs the package flash-linear-attention, which is not installed; install it "
            "(`pip install flash-linear-attention`), or use backend='torch' or 'auto'"
        )


def applies(backend: Backend, system: MemorySystem, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call on this device runs by the kernels.

    Their products are in half precision, so "auto" takes them only where the layer's own projections, of
    `dtype`, are.

    Raises:
        ValueError: for backend="fla" where the tensors are not on a GPU.
    """
    if backend == "fla":
        if device.type != "cuda":
            raise ValueError(f"backend='fla' runs on CUDA, but x is on {device}; use backend='auto'")
        return True
    half = dtype in (torch.bfloat16, torch.float16)
    return backend == "auto" and device.type == "cuda" and half and covers(system) and installed()


def run(
    system: MemorySystem, weights: RunningWeights, inputs: StepInputs, dtype: torch.dtype
) -> tuple[Tensor, RunningWeights]:
    """As `scan`, without the surprise: y [B, H, T, d] and the weights after the sequence.

    Keys, values and queries enter the products in `dtype` (bfloat16 where that is float32); decays, rates and
    the state are float32.
    """
    signals = generate_signals(system, weights.anchor, inputs, None)
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    q, k, v = (t.transpose(1, 2).to(half).contiguous() for t in (signals.q, signals.k, signals.v))
    eta, log_alpha = (t.transpose(1, 2).float().contiguous() for t in (signals.eta, signals.log_alpha))
    name = system.architecture.output
    W = weights.current[name].squeeze(1)  # [B, H, d_out, d_in]
    # the kernels' state is [B, H, key, value]: the transpose
    options = {"scale": 1.0, "initial_state": W.mT.float().contiguous(), "output_final_state": True}
    if isinstance(system.objective, L2):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        y, S = chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=eta, **options)
    else:
        from fla.ops.simple_gla import chunk_simple_gla

        # a rate of one, and zero for padding
        y, S = chunk_simple_gla(q, k, (v * eta.unsqueeze(-1)).to(half), g=log_alpha, **options)
    final = {name: S.mT.to(W.dtype).unsqueeze(1).contiguous()}
    return y.transpose(1, 2).to(signals.q.dtype), RunningWeights(final, final, None)
