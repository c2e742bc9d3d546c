"""The generic engine with its step compiled, for memories without a written-out form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.engines import compiler, exact, generic
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem


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


def compiled_step(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, want_surprise: bool
) -> tuple[Tensor, Weights, Weights | None, Tensor | None]:
    """A step as one compiled graph, where it is of full length.

    Shorter pieces, the last of a ragged sequence or single tokens, run plainly: the graph is that of one
    chunk, so no number of chunks and no length of a sequence compiles anew. Neither do more than a few
    numbers of rows: see `compiler.takes`.
    """
    take = exact.step if system.exact else generic.step
    if inputs.paths["k"].shape[2] != system.step:
        return take(system, initial, state, inputs, want_surprise)
    # The pieces of a sequence have the sequence's strides, on which the graph would depend.
    piece = Inputs(
        {name: x.contiguous() for name, x in inputs.paths.items()},
        None if inputs.gates is None else inputs.gates.contiguous(),
        inputs.readouts,
        None if inputs.real is None else inputs.real.contiguous(),
    )
    tensors = pytree.tree_leaves((initial, state.current, state.anchor, state.momentum, piece))
    kind = (
        system,
        want_surprise,
        state.at_anchor,
        piece.real is None,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(t is not None and t.requires_grad for t in tensors),
        tuple((W.shape, W.dtype, W.device) for W in initial.values()),
    )
    rows = len(piece.paths["k"])
    if not compiler.takes(kind, rows):
        return take(system, initial, state, inputs, want_surprise)
    found: tuple[Tensor, Weights, Weights | None, Tensor | None] = compiler.call(
        take, (kind, rows), system, initial, state, piece, want_surprise
    )
    return found
