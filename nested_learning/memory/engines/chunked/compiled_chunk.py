"""One chunk through torch.compile, forward and backward: the algebra as pure functions, one graph each.

The graph is that of one chunk at its place: nothing of it depends on the length of the sequence, on whether a
chunk is the first or a later one, or on which of several like layers it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.engines import compiler
from nested_learning.memory.engines.chunked.chunk import (
    ChunkGradients,
    ChunkInputs,
    Kept,
    backward_chunk,
    forward_chunk,
)
from nested_learning.memory.engines.chunked.memory import WeightMatrix
from nested_learning.memory.engines.chunked.scratch import Scratch
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.compiling import has_new_strides

Matrices = tuple[WeightMatrix, WeightMatrix]


class CompiledChunk(NamedTuple):
    """`forward_chunk` and `backward_chunk` of one kind of run, compiled.

    Attributes:
        like: [B, N, H, ...], a tensor with the dtype, the device and the sizes of the run.
        operands: as `Scratch` has it.
        error, keep: whether the error and what the backward pass needs are wanted: the compiler stores no
            more than that.
    """

    like: Tensor
    system: MemorySystem
    operands: torch.dtype | None
    error: bool = False
    keep: bool = False

    @property
    def kind(self) -> Hashable:
        """All that the graphs depend on but the number of rows."""
        like = self.like
        return *self[1:], like.shape[1:], like.dtype, like.device, torch.is_inference_mode_enabled()

    def forward(self, given: ChunkInputs, W1: WeightMatrix, W2: WeightMatrix) -> tuple[Any, ...]:
        """Results of `forward_chunk`, None for what is not wanted."""
        return self._call(_forward, *self[1:], ChunkInputs(*map(_alike, given)), _all_alike((W1, W2)))

    def backward(
        self, given: ChunkInputs, kept: Kept, after: Matrices, g_after: Matrices, gy: Tensor
    ) -> tuple[Matrices, ChunkGradients]:
        """Results of `backward_chunk`."""
        given, fixed = ChunkInputs(*map(_alike, given)), (self.system, self.operands)
        found: tuple[Matrices, ChunkGradients] = self._call(
            _backward, *fixed, given, kept, _all_alike(after), _all_alike(g_after), _alike(gy)
        )
        return found

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with torch.no_grad():
            return compiler.call(function, (self.kind, len(self.like)), *arguments)


def _alike(x: Tensor | None) -> Any:
    """x as a new tensor would be: a piece has its sequence's strides, one row is a view of what wants
    gradients, and a graph would be for such alone."""
    if x is None:
        return None
    return x.detach() if has_new_strides(x) else x.clone(memory_format=torch.contiguous_format)


def _all_alike(matrices: Matrices) -> Matrices:
    first, second = (WeightMatrix(*map(_alike, matrix)) for matrix in matrices)
    return first, second


def _forward(
    system: MemorySystem,
    operands: torch.dtype | None,
    error: bool,
    keep: bool,
    given: ChunkInputs,
    matrices: Matrices,
) -> tuple[Any, ...]:
    ws = Scratch(given.x.dtype, operands, reuse=False)
    y, W1, W2, missed, kept = forward_chunk(ws, system, given, *matrices)
    return y, W1, W2, missed if error else None, kept if keep else None


def _backward(
    system: MemorySystem, operands: torch.dtype | None, *arguments: Any
) -> tuple[Matrices, ChunkGradients]:
    return backward_chunk(Scratch(arguments[-1].dtype, operands, reuse=False), system, *arguments)
