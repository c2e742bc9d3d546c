"""A run as one operator, for a compiler: what is around it is fused, and no chunk is traced.

A compiler that follows Python code unrolls the chunks of a run: its graph grows with the length, and
compiling takes minutes. Here a graph holds `nested_learning::read` instead, which takes any number of tokens
(see library.py), and within which the engines run as they do without a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nested_learning.memory.engines.operator import library
from nested_learning.memory.engines.operator.pieces import WITHIN
from nested_learning.memory.engines.operator.plan import SEGMENT, named, state_in, state_names, written
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem

__all__ = ["SEGMENT", "WITHIN", "can_run", "run"]


def can_run(system: MemorySystem, call: Call) -> bool:
    """More than one token, where a compiler takes operators."""
    return call.one_operator and not call.one_token


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Results of the engine that runs within the operator."""
    tokens = inputs.paths["k"].shape[2]
    # A length that is a symbol may end anywhere: to ask would compile a graph for each answer.
    ends = all(statically_known_true(tokens % size == 0) for size in system.chunk_sizes)
    aligned = system.exact or (boundaries.common and ends)
    given = named(initial, state, inputs, boundaries)
    saves = "nothing"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given.values()):
        little = how.recompute or inputs.real is not None or not boundaries.common
        saves = "segments" if little or statically_known_true(tokens < system.step) else "chunks"
    plan = (saves, aligned, boundaries.common, how.backend, how.dtype, how.surprise, how.compile_step)
    results = library.read(list(given.values()), written(plan, list(given), system.key))
    names = state_names(system, not aligned)
    after = state_in(dict(zip(names, results[1:], strict=False)))
    surprise = results[1 + len(names)] if how.surprise else None
    state = MemoryState(after.anchor, after.current, after.momentum, state.position, state.conv_tail)
    return results[0].transpose(1, 2), state, surprise
