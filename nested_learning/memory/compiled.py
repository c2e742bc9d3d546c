"""The generic step through torch.compile, for memories without a fused run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nested_learning.memory import check
from nested_learning.memory.description import MemorySystem
from nested_learning.memory.signals import Readouts, StepInputs
from nested_learning.memory.step import RunningWeights, StepOutputs, step

Backend = str | Callable[..., Any]
BACKEND: Backend = "inductor"
_broken = False  # once compiling has failed


@cache
def _compiled(backend: Backend) -> Callable[..., StepOutputs]:
    return torch.compile(step, dynamic=False, backend=backend)


def compiled_step(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    want_surprise: bool,
) -> StepOutputs:
    """`step`, as one compiled graph for steps of full length.

    Shorter pieces, the last of a ragged sequence or single tokens, run plainly: the graph is that of one
    chunk, so no number of chunks and no length of a sequence compiles anew; another batch size does. Where
    compiling fails, as without a C++ compiler, it warns once and runs plainly from then on.
    """
    global _broken
    arguments = (system, initial, weights, inputs, readouts, want_surprise)
    whole = inputs.paths["k"].shape[2] == system.step
    if _broken or not whole or torch.compiler.is_compiling() or check.enabled():
        return step(*arguments)
    # The pieces of a sequence have the sequence's strides, on which the graph would depend.
    pieces = StepInputs(
        {name: x.contiguous() for name, x in inputs.paths.items()},
        None if inputs.gates is None else inputs.gates.contiguous(),
        None if inputs.write is None else inputs.write.contiguous(),
    )
    try:
        return _compiled(BACKEND)(system, initial, weights, pieces, readouts, want_surprise)
    except Exception as error:
        out = step(*arguments)  # raises again what is not the compiler's fault
        _broken = True
        warnings.warn(
            f"torch.compile of the memory step failed; it runs without from now on: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return out
