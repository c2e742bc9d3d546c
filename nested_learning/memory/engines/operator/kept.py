"""Whole chunks by the written-out algebra in an operator, and what the backward pass needs of all of them.

Each tensor that is kept of a chunk is a row of one that has them of all chunks: a compiled graph has as many
tensors for a long sequence as for a short one. Not all in one tensor: large ones come from the system anew at
each step, and on a CPU the first touch of their pages costs time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
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


def forward(
    plan: RunPlan, given: Mapping[str, Tensor], state: MemoryState, inputs: Inputs
) -> tuple[Tensor, MemoryState, Tensor | None, list[Tensor]]:
    """y, the state and the surprise after whole chunks, and what is saved: what is kept of the chunks and,
    unless the run ends with them, the state."""
    rows = empty_rows(plan, given, inputs.paths["k"].shape[2] // plan.system.chunk_size)
    rest = zip(*rows, strict=True)

    def keep(chunk: Kept) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(chunk) if leaf is not None]
        for place, leaf in zip(next(rest), leaves, strict=True):
            place.copy_(leaf)

    call, operands = chunked.described(plan.system, weights_in(given, "initial"), state, inputs, plan.how)
    y, W1, W2, S1, S2, surprise = chunked.forward(call, operands, keep)
    after = {"W1": W1, "W2": W2}
    state = MemoryState(after, after, {"W1": S1, "W2": S2} if plan.system.momentum else None)
    middle = (
        [] if plan.aligned else [t.clone() for t in state_tensors(state, state_names(plan.system, False))]
    )
    return y, state, surprise, [*rows, *middle]


def backward(
    plan: RunPlan,
    given: dict[str, Tensor],
    saved: Sequence[Tensor],
    end: list[Tensor],
    g_y: Tensor,
    g_after: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of whole chunks, by name.

    Args:
        saved: by `forward`.
        end: the state after the run, and `g_after` the gradients to that after these chunks by name.
        g_y: [B, T, H, d], of these chunks.
    """
    layout, names, tokens = _layout_for(plan, given), state_names(plan.system, False), g_y.shape[1]
    rows, after = saved[: layout.number], list(saved[layout.number :]) or end
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
    chunks = [layout.unpacked(chunk) for chunk in zip(*rows, strict=True)]
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


def state_after(plan: RunPlan, given: Mapping[str, Tensor], saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """The state after whole chunks, of what `forward` saved; none where the run ends with them."""
    return saved[_layout_for(plan, given).number :]


def empty_rows(plan: RunPlan, given: Mapping[str, Tensor], chunks: int | torch.SymInt) -> list[Tensor]:
    """The tensors [chunks, ...] for what is kept of so many chunks."""
    k = given["k"]
    rows, layout = k.shape[0] * k.shape[2], _layout_for(plan, given)
    return [
        k.new_empty(chunks, *(rows if n < 0 else n for n in shape), dtype=torch.bool if flag else None)
        for shape, flag in zip(layout.shapes, layout.flags, strict=True)
        if shape is not None
    ]


def _layout_for(plan: RunPlan, given: Mapping[str, Tensor]) -> _Layout:
    _, _, H, d = given["k"].shape
    return _layout(plan.system, int(H), int(d))


class _Layout(NamedTuple):
    """What is kept of a chunk."""

    spec: pytree.TreeSpec  # how it is nested
    shapes: tuple[tuple[int, ...] | None, ...]  # of its tensors, −1 for rows times heads; None: there is none
    flags: tuple[bool, ...]  # which of them are of truth values

    @property
    def number(self) -> int:
        """Number of tensors."""
        return sum(shape is not None for shape in self.shapes)

    def unpacked(self, tensors: Sequence[Tensor]) -> Kept:
        """What is kept of a chunk, from its tensors."""
        rest = iter(tensors)
        leaves = [None if shape is None else next(rest) for shape in self.shapes]
        chunk: Kept = pytree.tree_unflatten(leaves, self.spec)
        return chunk


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
