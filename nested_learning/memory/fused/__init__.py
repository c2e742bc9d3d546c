"""Whole chunks of the most used memories as one autograd function each, for speed.

The generic step (scan.py) stays the definition: a fused run covers the training case alone, whole chunks from
a boundary on, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nested_learning.memory import check
from nested_learning.memory.description import MemorySystem
from nested_learning.memory.fused import self_modifying, titans
from nested_learning.memory.fused.function import Generic, apply
from nested_learning.ops.blocks import traced

if TYPE_CHECKING:
    from nested_learning.memory.signals import Readouts, StepInputs
    from nested_learning.memory.step import RunningWeights


class Outputs(NamedTuple):
    y: Tensor  # [B, H, T, d]
    surprise: Tensor | None  # [B, T]
    weights: dict[str, Tensor]  # after the last chunk: the anchors of the next
    momentum: dict[str, Tensor] | None


def supports(system: MemorySystem, weights: RunningWeights, inputs: StepInputs) -> bool:
    """Whether `run` covers this system, at a boundary of all its memories and without padding."""
    return (
        (self_modifying.covers(system) or titans.covers(system))
        and weights.at_anchor
        and inputs.write is None
        and not check.enabled()  # the checks look at every chunk
        and not traced()
    )


def run(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts | None,
    want_surprise: bool,
    generic: Generic,
    operands: torch.dtype | None = None,
) -> Outputs:
    """Run over whole chunks.

    Args:
        inputs: of T tokens, a multiple of the chunk length.
        generic: the same by the generic step, differentiated where second derivatives are wanted.
        operands: dtype that the factors of products are rounded to, None for that of the weights.
    """
    if titans.covers(system):
        y, W1, W2, S1, S2, surprise = apply(
            *titans.prepare(system, initial, weights, inputs, want_surprise, generic, operands)
        )
        return Outputs(y, surprise, {"W1": W1, "W2": W2}, {"W1": S1, "W2": S2})
    assert readouts is not None  # its gates are generated
    y, W1, W2, surprise = apply(
        *self_modifying.prepare(system, initial, weights, inputs, readouts, want_surprise, generic, operands)
    )
    return Outputs(y, surprise, {"W1": W1, "W2": W2}, None)
