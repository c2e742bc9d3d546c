"""Matrix memories on a GPU by the kernels of flash-linear-attention, where that package is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.signals import gates
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem

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
        and not system.objective.transposed
        and not system.momentum
        and not any(rule.erase for rule in system.rule.values())
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


def can_run(system: MemorySystem, call: Call) -> bool:
    """Whether a run goes by the kernels, which give no surprise.

    Their products are in half precision, so "auto" takes them only where the layer's own projections are.

    Raises:
        ValueError: for backend="fla" where the tensors are not on a GPU.
    """
    if call.backend == "fla" and call.device != "cuda":
        raise ValueError(f"backend='fla' runs on CUDA, but x is on {call.device}; use backend='auto'")
    half = call.dtype in (torch.bfloat16, torch.float16)
    wanted = call.backend == "fla" or (call.backend == "auto" and call.device == "cuda" and half)
    followed = call.traced and not call.compiling  # the kernels are no operations that torch.func knows
    return wanted and not (call.surprise or call.one_token or followed) and covers(system) and installed()


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Results of `generic.run`, without the surprise.

    Keys, values and queries enter the products in the projections' precision (bfloat16 where that is
    float32); decays, rates and the state are float32.
    """
    gate = gates(system, inputs.gates, inputs.paths["k"], inputs.real)
    half = how.dtype if how.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    q, k, v = (inputs.paths[name].transpose(1, 2).to(half).contiguous() for name in ("q", "k", "v"))
    eta, log_alpha = (t.transpose(1, 2).float().contiguous() for t in (gate.eta, gate.log_alpha))
    name = system.architecture.output
    W = state.current[name].squeeze(1)  # [B, H, d_out, d_in]
    # the kernels' state is [B, H, key, value]: the transpose
    options = {"scale": 1.0, "initial_state": W.mT.float().contiguous(), "output_final_state": True}
    if system.objective.sees_answer:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        y, S = chunk_gated_delta_rule(q, k, v, g=log_alpha, beta=eta, **options)
    else:
        from fla.ops.simple_gla import chunk_simple_gla

        # a rate of one, and zero for padding
        y, S = chunk_simple_gla(q, k, (v * eta.unsqueeze(-1)).to(half), g=log_alpha, **options)
    final = {name: S.mT.to(W.dtype).unsqueeze(1).contiguous()}
    after = MemoryState(final, final, None, state.position, state.conv_tail)
    return y.transpose(1, 2).to(inputs.paths["q"].dtype), after, None
