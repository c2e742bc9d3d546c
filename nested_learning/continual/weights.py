"""How a model runs with a row's deltas: W_base + Σ Δ in the place of W_base, for the time of a scope.

Full deltas are added up into one matrix per weight, which stands in the module while the scope lasts; its
gradient, one for all levels, is what backpropagation computes anyway. So a token costs what it costs the
plain model, and the sum is made once per write instead of once per token. (Forward hooks that add x·Δᵀ
would double the cost of every learned map and would have to be paid for each token; torch.func's
functional_call would swap back before gradient checkpointing runs the layers again.) Low-rank deltas are
added by forward hooks, as x·downᵀ·upᵀ: that is cheaper than the full product, and works on quantised
weights.

Rows of a batch have different weights, so they run one after the other: with full matrices per row, a
batched product would read as many weights, and a row alone is then bit for bit what it is in a batch.

The base model's parameters are not written: the parameter object leaves the module's table for the time of
the scope and returns to it. One lock per base model keeps threads apart.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nested_learning.continual.deltas import DOWN, UP, Row
from nested_learning.continual.find import Target
from nested_learning.continual.writing import DeltaWriter
from nested_learning.memory.state import Weights


@dataclass
class _Buffers:
    """Effective weights by name, and the version of the row that they were made for."""

    weights: Weights
    version: Hashable | None = None

    @torch.no_grad()
    def effective(self, writers: Sequence[DeltaWriter], row: Row) -> dict[Target, Tensor]:
        """W_base + Σ Δ for each weight that has a full delta or may get one; W_base itself without any Δ."""
        deltas: dict[Target, list[Tensor]] = {}
        for writer, state in zip(writers, row.levels, strict=True):
            for target in writer.full_targets:
                found = deltas.setdefault(target, [])
                if target.name in state.deltas:
                    found.append(state.deltas[target.name])
        # Without a version until all sums are made: an exception in between must not leave stale ones valid.
        stale, self.version = self.version != row.version, None
        effective = {}
        for target, found in deltas.items():
            weight = target.weight
            if found:
                buffer = self.weights.get(target.name)
                if buffer is None or stale:
                    buffer = _sum_into(buffer, weight, found)
                self.weights[target.name] = weight = buffer
            # A view of its own: `requires_grad_` for one scope stays off the buffer and the parameter.
            effective[target] = weight.detach()
        self.version = row.version
        return effective


def _sum_into(buffer: Tensor | None, weight: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """W + Σ Δ in the precision of the memory, rounded once to that of the weight."""
    total = deltas[0] if len(deltas) == 1 else torch.add(deltas[0], deltas[1])
    for delta in deltas[2:]:
        total = total.add_(delta)
    if buffer is None or buffer.shape != weight.shape or buffer.dtype != weight.dtype:
        buffer = torch.empty_like(weight)
    return torch.add(total, weight, out=buffer)


@dataclass
class _Installation:
    """Everything that one scope puts into the model's modules."""

    weights: dict[Target, Tensor]
    factors: list[tuple[DeltaWriter, Target, Tensor, Tensor]]
    handles: list[RemovableHandle] = field(default_factory=list)

    def put(self) -> None:
        # Into the table of parameters itself: setattr would refuse a plain tensor, and a new nn.Parameter
        # would cut the leaf from the graph. The module's `forward` finds the weight there by its name.
        for target, weight in self.weights.items():
            target.module._parameters["weight"] = weight  # type: ignore[assignment]
        for _, target, down, up in self.factors:
            hook = partial(_add_low_rank, down, up)
            self.handles.append(target.module.register_forward_hook(hook))

    def remove(self) -> None:
        for target in self.weights:
            target.module._parameters["weight"] = target.weight  # type: ignore[assignment]
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def leaves(self, writers: Sequence[DeltaWriter]) -> Weights:
        """Turn the matrices of the levels that learn into leaves of the graph to come."""
        learned = {key for writer in writers if writer.learns for key in writer.keys.values()}
        leaves = {target.name: weight for target, weight in self.weights.items()}
        for writer, target, down, up in self.factors:
            leaves[writer.keys[target.name + DOWN]] = down
            leaves[writer.keys[target.name + UP]] = up
        return {key: leaf.requires_grad_() for key, leaf in leaves.items() if key in learned}


def _add_low_rank(
    down: Tensor, up: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> Tensor:
    """Forward hook: y + x downᵀ upᵀ, in the precision of the model."""
    x = inputs[0]
    return y + nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype))


class Workspace:
    """The effective weights of one base model, shared by all learners on it, made anew when they differ."""

    _of_model: ClassVar[WeakKeyDictionary[nn.Module, Workspace]] = WeakKeyDictionary()
    _guard: ClassVar = threading.Lock()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.keep = 1  # sets of effective weights that stay between scopes, those that were used last
        self._free: list[_Buffers] = []
        self._active: list[_Installation] = []

    @classmethod
    def of(cls, model: nn.Module) -> Workspace:
        """The workspace of a base model, one for all learners on it."""
        with cls._guard:
            return cls._of_model.setdefault(model, cls())

    @property
    def in_use(self) -> bool:
        """Whether deltas stand in the model's modules, in whatever thread."""
        return bool(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of the effective weights that are kept between calls."""
        return sum(t.numel() * t.element_size() for b in self._free for t in b.weights.values())

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The base model has its own parameters inside the scope, also within a scope of deltas, and other
        threads wait: for whoever takes hold of parameters, copies or measures them."""
        with self.lock:
            if self._active:
                self._active[-1].remove()
            try:
                yield
            finally:
                if self._active:
                    self._active[-1].put()

    @contextmanager
    def installed(
        self, writers: Sequence[DeltaWriter], row: Row, *, learning: bool = False
    ) -> Iterator[Weights]:
        """The base model runs with the row's deltas inside the scope, and with nobody else's.

        Args:
            writers: one per level.
            row: the row whose deltas are in force.
            learning: make leaves that want gradients, for all levels that learn.

        Yields:
            the leaf of each matrix that wants a gradient, by `DeltaWriter.keys`. Empty without `learning`.
        """
        with self.lock:
            buffers = self._take(row.version)
            factors = [
                (writer, target, down.detach(), up.detach())
                for writer, state in zip(writers, row.levels, strict=True)
                for target in writer.low_rank_targets
                for down, up in [writer.factors(state, target)]
            ]
            installation = _Installation(buffers.effective(writers, row), factors)
            # One installation at a time: that of the scope around this one steps aside until this one ends.
            if self._active:
                self._active[-1].remove()
            self._active.append(installation)
            try:
                leaves = installation.leaves(writers) if learning else {}
                installation.put()
                yield leaves
            finally:
                self._active.pop().remove()
                if self._active:
                    self._active[-1].put()
                self._free.append(buffers)
                del self._free[: -self.keep]

    def _take(self, version: Hashable) -> _Buffers:
        """The free set that was made for a version of a row, else one to fill: a scope in a scope has its own."""
        for index, buffers in enumerate(self._free):
            if buffers.version == version:
                return self._free.pop(index)
        is_full = len(self._free) + len(self._active) >= self.keep
        return self._free.pop(0) if self._free and is_full else _Buffers({})
