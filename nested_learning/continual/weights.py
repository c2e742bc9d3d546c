"""How a model runs with a row's deltas: W_base + Σ Δ in the place of W_base, for the time of a scope.

Full deltas are added up into one matrix per weight, which stands in the module while the scope lasts; its
gradient, one for all levels, is what backpropagation computes anyway. So a token costs what it costs the
plain model, and the sum is made once per write instead of once per token. (Forward hooks that add x·Δᵀ
would double the cost of every learned map and would have to be paid for each token; torch.func's
functional_call would swap back before gradient checkpointing runs the layers again.) Low-rank deltas are
added by forward hooks, as x·downᵀ·upᵀ: that is cheaper than the full product, and works on quantised
weights. So are full deltas of quantised weights, as x·(Σ Δ)ᵀ, since there is nothing to add them to. Stacked
experts multiply inside one module, where no hook reaches: around its `forward` their weight is W + up·down.

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
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row, product
from nested_learning.continual.find import Target, is_quantised, memory_dtype
from nested_learning.continual.units import SparseDelta
from nested_learning.continual.writing import DeltaWriter
from nested_learning.memory.state import Weights


def acting(writers: Sequence[DeltaWriter], row: Row) -> Iterator[tuple[DeltaWriter, DeltaState, Target]]:
    """Each delta that is in force: its writer, its state and its weight; some have never been written.

    While text is read averages are not. In answers an average stands in the place of the level that it
    averages, on the weights that it has.
    """
    chosen = [w.index for w in writers if w.averaged is None] if row.in_force is None else row.in_force
    replaced = {
        (writer.averaged.index, target.name)
        for writer in writers
        if writer.averaged is not None and writer.index in chosen
        for target in writer.targets
    }
    for writer, state in zip(writers, row.levels, strict=True):
        for target in writer.targets if writer.index in chosen else ():
            if (writer.index, target.name) not in replaced:
                yield writer, state, target


FACTORS = "_factors_in_force"  # attribute of a module: (down, up) of each low-rank delta in force


@dataclass
class _Buffers:
    """Effective weights by name, and the versions of the row and of the base that they were made for.

    Attributes:
        base: what tells whether a weight of the base model has been written to since, by name.
        written: by name, the slices of a weight in which it differs from W_base, if only those of hidden
            units do: the next sum need not touch others.
    """

    weights: Weights
    version: Hashable | None = None
    base: dict[str, tuple[int, int]] = field(default_factory=dict)
    written: Weights = field(default_factory=dict)

    @torch.inference_mode(False)  # what stays must be usable outside of that mode
    @torch.no_grad()
    def effective(self, writers: Sequence[DeltaWriter], row: Row, learning: bool) -> dict[Target, Tensor]:
        """W_base + Σ Δ for each weight that has a full delta or may get one; W_base itself without any Δ.

        For a quantised weight Σ Δ alone, and only where there is one, or one may be learned.
        """
        deltas: dict[Target, list[Tensor | SparseDelta]] = {}
        for writer, state, target in acting(writers, row):
            if writer.level.rank is None:
                found = deltas.setdefault(target, [])
                if (delta := writer.delta(state, target)) is not None:
                    found.append(delta)
        # Without a version until all sums are made: an exception in between must not leave stale ones valid.
        stale, self.version = self.version != row.version, None
        effective = {}
        for target, found in deltas.items():
            weight = target.weight
            if is_quantised(weight):
                if not found and not learning:
                    continue
                nothing = torch.zeros((), dtype=memory_dtype(weight), device=weight.device)
                weight = nothing.expand(target.shape)
            if found:
                buffer, base = self.weights.get(target.name), _base_version(target.weight)
                if self.base.get(target.name) != base:  # whatever was kept is of another model
                    buffer = None
                    self.written.pop(target.name, None)
                    self.base[target.name] = base
                if buffer is None or stale:
                    buffer = self._sum(target.name, weight, found)
                self.weights[target.name] = weight = buffer
            # A view of its own: `requires_grad_` for one scope stays off the buffer and the parameter.
            effective[target] = weight.detach()
        self.version = row.version
        return effective

    def _sum(self, name: str, weight: Tensor, deltas: Sequence[Tensor | SparseDelta]) -> Tensor:
        buffer, written = self.weights.get(name), self.written.pop(name, None)
        sparse = [delta for delta in deltas if isinstance(delta, SparseDelta)]
        if len(sparse) < len(deltas):
            full = [each.full(weight) if isinstance(each, SparseDelta) else each for each in deltas]
            return _sum_into(buffer, weight, full)
        delta = SparseDelta.sum(sparse)
        axis, where = delta.place.axis, delta.place.slices(delta.units)
        if buffer is None or not _alike(buffer, weight):
            buffer = weight.detach().clone()
        elif written is None:
            buffer.copy_(weight)
        else:
            buffer.index_copy_(axis, written, weight.index_select(axis, written))
        slices = delta.place.laid_out(delta.rows) + weight.index_select(axis, where)
        self.written[name] = where
        return buffer.index_copy_(axis, where, slices.to(buffer.dtype))


def _sum_into(buffer: Tensor | None, weight: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """W + Σ Δ in the precision of the memory, rounded once to that of the weight."""
    total = deltas[0] if len(deltas) == 1 else torch.add(deltas[0], deltas[1])
    for delta in deltas[2:]:
        total = total.add_(delta)
    if buffer is None or not _alike(buffer, weight):
        buffer = torch.empty_like(weight)
    return torch.add(total, weight, out=buffer)


def _base_version(weight: Tensor) -> tuple[int, int]:
    """Where a parameter lies, and how often it was written to; not through `.data`, which nothing counts."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _alike(buffer: Tensor, weight: Tensor) -> bool:
    return buffer.shape == weight.shape and buffer.dtype == weight.dtype


@dataclass
class _Installation:
    """Everything that one scope puts into the model's modules.

    Args:
        weights: tensors in the place of weights.
        factors: of each low-rank delta its writer, its weight, `down` and `up`.
        model: the base model.
        call: call of the model in the scope in the place of its own; None for the plain one.
    """

    weights: dict[Target, Tensor]
    factors: list[tuple[DeltaWriter, Target, Tensor, Tensor]]
    model: nn.Module
    call: Any = None
    handles: list[RemovableHandle] = field(default_factory=list)
    compiled: dict[nn.Module, Any] = field(default_factory=dict)

    def put(self) -> None:
        # A compiled call does not look for new hooks, and compiles anew for each length of the context.
        for module in self.model.modules():
            if module._compiled_call_impl is not None:
                self.compiled[module] = module._compiled_call_impl
                module._compiled_call_impl = None
        if self.call is not None:
            self.compiled.setdefault(self.model, None)
            self.model._compiled_call_impl = partial(self.call, self.model)
        added: dict[Target, list[tuple[Tensor, Tensor]]] = {}
        for _, target, down, up in self.factors:
            added.setdefault(target, []).append((down, up))
        for target, pairs in added.items():
            module = target.module
            if not target.stack:
                module.__dict__[FACTORS] = tuple(pairs)
                self._hook(target, _add_low_rank)
                continue
            self.handles.append(module.register_forward_pre_hook(partial(self._fuse, target, pairs)))
            after = partial(self._restore, target)
            self.handles.append(module.register_forward_hook(after, always_call=True))
        # Into the table of parameters itself: setattr would refuse a plain tensor, and a new nn.Parameter
        # would cut the leaf from the graph. The module's `forward` finds the weight there by its name.
        for target, weight in self.weights.items():
            if is_quantised(target.weight):
                self._hook(target, partial(_add_full, target.transposed, weight))
            else:
                target.module._parameters[target.parameter] = weight  # type: ignore[assignment]

    def _hook(self, target: Target, hook: Any) -> None:
        self.handles.append(target.module.register_forward_hook(hook))

    def _fuse(
        self, target: Target, pairs: Sequence[tuple[Tensor, Tensor]], module: nn.Module, inputs: Any
    ) -> None:
        """Forward pre-hook of stacked experts: their weight is W + Σ up · down, rounded once."""
        weight = self.weights.get(target, target.weight)
        total = sum((product(down, up) for down, up in pairs[1:]), product(*pairs[0]))
        total = (total.mT if target.transposed else total) + weight
        module._parameters[target.parameter] = total.to(weight.dtype)  # type: ignore[assignment]

    def _restore(self, target: Target, module: nn.Module, inputs: Any, y: Any) -> None:
        """Forward hook that takes the sum out again, for it is part of the pass's graph."""
        module._parameters[target.parameter] = self.weights.get(target, target.weight)  # type: ignore[assignment]

    def remove(self) -> None:
        for target in self.weights:
            target.module._parameters[target.parameter] = target.weight  # type: ignore[assignment]
        for _, target, _, _ in self.factors:
            target.module.__dict__.pop(FACTORS, None)
        for handle in self.handles:
            handle.remove()
        for module, call in self.compiled.items():
            module._compiled_call_impl = call
        self.handles.clear()
        self.compiled.clear()

    def leaves(self, writers: Sequence[DeltaWriter]) -> Weights:
        """Turn the matrices of the levels that learn into leaves of the graph to come."""
        learned = {key for writer in writers if writer.learns for key in writer.keys.values()}
        leaves = {target.name: weight for target, weight in self.weights.items()}
        for writer, target, down, up in self.factors:
            if not writer.fixed_down:
                leaves[writer.keys[target.name + DOWN]] = down
            leaves[writer.keys[target.name + UP]] = up
        return {key: leaf.requires_grad_() for key, leaf in leaves.items() if key in learned}


def _add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Forward hook: y + Σ x downᵀ upᵀ, in the precision of the model.

    It takes the factors from the module, for what a hook itself holds is a constant to a compiler.
    """
    x = inputs[0]
    for down, up in module.__dict__[FACTORS]:
        y = y + nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return y


def _add_full(
    transposed: bool, delta: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> Tensor:
    """Forward hook: y + x Δᵀ, in the precision of the model."""
    delta = delta.to(inputs[0].dtype)
    return y + nn.functional.linear(inputs[0], delta.mT if transposed else delta)


def _check_parameters(writers: Sequence[DeltaWriter]) -> None:
    """Raise ValueError where the model has another parameter than the one that a level has its delta on, or
    has it on another device than when the learner was made."""
    for writer, target in ((each, target) for each in writers for target in each.targets):
        if target.weight.device != (before := writer.devices[target.name]):
            raise ValueError(
                f"{target.name} of the base model is on {target.weight.device} and was on {before} when "
                "the learner was made, where its memory is: save that, make a learner on the model where it "
                "is now, and load it"
            )
        if target.module._parameters.get(target.parameter) is not target.weight:
            raise ValueError(
                f"{target.name} of the base model is another parameter than when the learner was made (as "
                "after load_state_dict(assign=True), merging an adapter or quantising); make a learner on "
                "the model as it is now, and load its memory"
            )


class Workspace:
    """The effective weights of one base model, shared by all learners on it, made anew when they differ."""

    _of_model: ClassVar[WeakKeyDictionary[nn.Module, Workspace]] = WeakKeyDictionary()
    _guard: ClassVar = threading.Lock()

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.lock = threading.RLock()
        self.call: Any = None  # a compiled call of the model, for scopes of deltas; see `compiled_calls`
        self.keep = 1  # sets of effective weights that stay between scopes, those that were used last
        self._free: list[_Buffers] = []
        self._active: list[_Installation] = []

    @classmethod
    def of(cls, model: nn.Module) -> Workspace:
        """The workspace of a base model, one for all learners on it."""
        with cls._guard:
            return cls._of_model.setdefault(model, cls(model))

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
            if not self._active:
                _check_parameters(writers)
            buffers = self._take(row.version)
            factors = [
                (writer, target, down.detach(), up.detach())
                for writer, state, target in acting(writers, row)
                if writer.level.rank is not None
                if learning or target.name + UP in state.deltas  # reading makes none
                for down, up in [writer.factors(state, target)]
            ]
            installation = self._installation(buffers.effective(writers, row, learning), factors)
            installation.call = self.call
            leaves = installation.leaves(writers) if learning else {}
            try:
                with self._put(installation):
                    yield leaves
            finally:
                self._free.append(buffers)
                del self._free[: -self.keep]

    @contextmanager
    def placed(
        self,
        weights: dict[Target, Tensor],
        factors: list[tuple[DeltaWriter, Target, Tensor, Tensor]],
    ) -> Iterator[None]:
        """The base model runs with these tensors inside the scope, and gradients flow into their graph.

        Args:
            weights: W_base + Σ Δ of full deltas in the place of W_base; of a quantised weight Σ Δ alone.
            factors: of each low-rank delta its writer, its weight, `down` [r, in] and `up` [out, r].
        """
        with self.lock, self._put(self._installation(weights, factors)):
            yield

    def _installation(
        self,
        weights: dict[Target, Tensor],
        factors: list[tuple[DeltaWriter, Target, Tensor, Tensor]],
    ) -> _Installation:
        model = self._model()
        assert model is not None  # whoever reads with it holds it
        return _Installation(weights, factors, model)

    @contextmanager
    def _put(self, installation: _Installation) -> Iterator[None]:
        # One installation at a time: that of the scope around this one steps aside until this one ends.
        if self._active:
            self._active[-1].remove()
        self._active.append(installation)
        try:
            installation.put()
            yield
        finally:
            self._active.pop().remove()
            if self._active:
                self._active[-1].put()

    def _take(self, version: Hashable) -> _Buffers:
        """The free set made for a version of a row, else one to fill: a scope in a scope has its own."""
        for index, buffers in enumerate(self._free):
            if buffers.version == version:
                return self._free.pop(index)
        is_full = len(self._free) + len(self._active) >= self.keep
        return self._free.pop(0) if self._free and is_full else _Buffers({})
