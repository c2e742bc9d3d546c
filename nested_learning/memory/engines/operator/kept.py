"""Whole chunks by the written-out algebra in an operator: what the backward pass needs goes into one tensor.

A row of it is what is kept of a chunk: a compiled graph has as many tensors for a long sequence as for a
short one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.engines import chunked
from nested_learning.memory.engines.chunked.chunk import Kept
from nested_learning.memory.engines.operator.plan import (
    RunPlan,
    inputs_in,
    state_in,
    state_names,
    state_tensors,
    weights_in,
)
from nested_learning.memory.running import How, Inputs, MemoryState, Readouts
from nested_learning.memory.system import MemorySystem

# Numbers to whose multiples the tensors in a row begin, for kernels that read several at once.
_ALIGNED = 16


def forward(
    plan: RunPlan, given: Mapping[str, Tensor], state: MemoryState, inputs: Inputs
) -> tuple[Tensor, MemoryState, Tensor | None, list[Tensor]]:
    """y, the state and the surprise after whole chunks, and what is saved: what is kept of the chunks and,
    unless the run ends with them, the state."""
    rows = empty_rows(plan, given, inputs.paths["k"].shape[2] // plan.system.chunk_size)
    (layout, count), rest = _layout_for(plan, given), iter(rows)

    def keep(chunk: Kept) -> None:
        for place, leaf in zip(layout.parts(next(rest), count), pytree.tree_leaves(chunk), strict=True):
            if place is not None:
                place.copy_(leaf)

    call, operands = chunked.described(plan.system, weights_in(given, "initial"), state, inputs, plan.how)
    y, W1, W2, S1, S2, surprise = chunked.forward(call, operands, keep)
    after = {"W1": W1, "W2": W2}
    state = MemoryState(after, after, {"W1": S1, "W2": S2} if plan.system.momentum else None)
    middle = (
        [] if plan.aligned else [t.clone() for t in state_tensors(state, state_names(plan.system, False))]
    )
    return y, state, surprise, [rows, *middle]


def backward(
    plan: RunPlan,
    given: dict[str, Tensor],
    rows: Tensor,
    after: list[Tensor],
    g_y: Tensor,
    g_after: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of whole chunks, by name.

    Args:
        rows: what is kept of each chunk.
        after: the state after them, and `g_after` the gradients to it by name.
        g_y: [B, T, H, d], of these chunks.
    """
    names, tokens = state_names(plan.system, False), g_y.shape[1]
    g_state = [torch.zeros_like(W) for W in after]
    for name, value in g_after.items():  # where the run ends here, the current weights are the anchors too
        g_state[names.index(name.replace("anchor", "current"))] += value
    start = "anchor" if "anchor.W1" in given else "current"  # which of them the chunks go on from
    begun = [name.replace("current", start) for name in names]
    if tokens == 0:
        return {name: value for name, value in zip(begun, g_state, strict=True) if name in given}
    whole = inputs_in(given).split([tokens, given["k"].shape[1] - tokens])[0]
    call, operands = chunked.described(
        plan.system, weights_in(given, "initial"), state_in(given), whole, plan.how
    )
    layout, count = _layout_for(plan, given)
    chunks = [layout.unpacked(row, count) for row in rows]
    missing = [None] * (4 - len(names))
    slopes = chunked.backward(
        call, operands, [*after, *missing], chunks, g_y.transpose(1, 2), [*g_state, *missing]
    )
    found = dict(zip(begun, (slopes.W1, slopes.W2, slopes.S1, slopes.S2), strict=False))
    found |= {
        name: path.transpose(1, 2) for name, path in (("k", slopes.k), ("v", slopes.v), ("q", slopes.q))
    }
    found |= {"initial.W2": slopes.W2_init, "gates": slopes.logits}
    found |= {"readout": slopes.readout, "bias": slopes.bias}
    return {name: t for name, t in found.items() if t is not None and name in given}


def empty_rows(plan: RunPlan, given: Mapping[str, Tensor], count: int | torch.SymInt) -> Tensor:
    """The tensor for what is kept of so many chunks [count, numbers of a chunk]."""
    layout, rows = _layout_for(plan, given)
    return given["k"].new_empty(count, layout.length(rows))


def _layout_for(plan: RunPlan, given: Mapping[str, Tensor]) -> tuple[_Layout, int]:
    """The layout of a chunk, and the number of rows times heads."""
    B, _, H, d = given["k"].shape
    return _layout(plan.system, int(H), int(d)), B * H


class _Layout(NamedTuple):
    """How what is kept of a chunk lies in a row."""

    spec: pytree.TreeSpec  # how it is nested
    shapes: tuple[tuple[int, ...] | None, ...]  # of its tensors, −1 for rows times heads; None: there is none
    flags: tuple[bool, ...]  # which of them are of truth values

    def sizes(self, rows: int) -> list[tuple[int, ...] | None]:
        """The shapes for so many rows times heads."""
        return [
            None if shape is None else tuple(rows if n < 0 else n for n in shape) for shape in self.shapes
        ]

    def length(self, rows: int) -> int:
        """Numbers of a chunk."""
        return sum(_rounded(prod(shape)) for shape in self.sizes(rows) if shape is not None)

    def parts(self, row: Tensor, rows: int) -> list[Tensor | None]:
        """The tensors of a chunk, as parts of its row."""
        parts: list[Tensor | None] = []
        start = 0
        for shape in self.sizes(rows):
            if shape is None:
                parts.append(None)
                continue
            parts.append(row[start : start + prod(shape)].view(shape))
            start += _rounded(prod(shape))
        return parts

    def unpacked(self, row: Tensor, rows: int) -> Kept:
        """What is kept of a chunk, from its row."""
        parts = zip(self.parts(row, rows), self.flags, strict=True)
        chunk: Kept = pytree.tree_unflatten(
            [part.bool() if flag and part is not None else part for part, flag in parts], self.spec
        )
        return chunk


def _rounded(numbers: int) -> int:
    return -(-numbers // _ALIGNED) * _ALIGNED


@cache
def _layout(system: MemorySystem, heads: int, width: int) -> _Layout:
    """The layout for heads of a width, found out without numbers."""
    (one, spec), (two, _) = (pytree.tree_flatten(_one_chunk(system, rows, heads, width)) for rows in (1, 2))
    shapes = [
        None if a is None else tuple(n if n == m else -1 for n, m in zip(a.shape, b.shape, strict=True))
        for a, b in zip(one, two, strict=True)
    ]
    return _Layout(spec, tuple(shapes), tuple(a is not None and a.dtype == torch.bool for a in one))


def _one_chunk(system: MemorySystem, B: int, H: int, d: int) -> Kept:
    """What is kept of one chunk, on a device without numbers."""
    N, C = len(system.memories), system.chunk_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    shapes = system.architecture.shapes(d)
    W = {name: empty(B, N, H, *shape) for name, shape in shapes.items()}
    initial = {name: empty(N, H, *shape) for name, shape in shapes.items()}
    paths = {name: empty(B, H, C, d) for name in ("k", "v", "q")}
    inputs = Inputs(paths, empty(len(system.gates), B, H, C))
    if "eta" in system.generated:
        inputs = Inputs(paths, readouts=Readouts(empty(2, H, d), empty(2, H)))
    kept: list[Kept] = []
    run = chunked.described(system, initial, MemoryState(W, W), inputs, How("torch", torch.float32))
    chunked.forward(*run, kept.append)
    return kept[0]
