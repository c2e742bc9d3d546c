"""The generic engine with its step compiled, for memories without a written-out form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nested_learning.memory.engines import exact, generic
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem

Compiler = str | Callable[..., Any]
BACKEND: Compiler = "inductor"
_broken = False  # once compiling has failed


def can_run(system: MemorySystem, call: Call) -> bool:
    """Any system, where compiling is asked for and neither checks nor what traces look into its steps."""
    return call.compile_step and not call.traced and not call.checked


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Results of `generic.run`, with compiled steps."""
    return generic.run(system, initial, state, inputs, boundaries, how, compiled_step)


@cache
def _compiled(take: generic.StepFunction, compiler: Compiler) -> generic.StepFunction:
    return torch.compile(take, dynamic=False, backend=compiler)


def compiled_step(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, want_surprise: bool
) -> tuple[Tensor, Weights, Weights | None, Tensor | None]:
    """A step as one compiled graph, where it is of full length.

    Shorter pieces, the last of a ragged sequence or single tokens, run plainly: the graph is that of one
    chunk, so no number of chunks and no length of a sequence compiles anew; another batch size does. Where
    compiling fails, as without a C++ compiler, it warns once and runs plainly from then on.
    """
    global _broken
    take = exact.step if system.exact else generic.step
    if _broken or inputs.paths["k"].shape[2] != system.step:
        return take(system, initial, state, inputs, want_surprise)
    # The pieces of a sequence have the sequence's strides, on which the graph would depend.
    piece = Inputs(
        {name: x.contiguous() for name, x in inputs.paths.items()},
        None if inputs.gates is None else inputs.gates.contiguous(),
        inputs.readouts,
        None if inputs.real is None else inputs.real.contiguous(),
    )
    try:
        return _compiled(take, BACKEND)(system, initial, state, piece, want_surprise)
    except Exception as error:
        out = take(system, initial, state, inputs, want_surprise)  # raises again what is not the compiler's
        _broken = True
        warnings.warn(
            f"torch.compile of the memory step failed; it runs without from now on: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return out
