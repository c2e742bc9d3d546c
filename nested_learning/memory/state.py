"""State as a value: what a running layer has to remember, as a tree of tensors.

A state goes into a layer and a new one comes out; no layer writes to a parameter or a buffer. Every
tensor of a state has the batch as its first dimension, so moving, detaching, reordering and saving are
each one map over the tree.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.ops.compiling import has_new_strides
from nested_learning.ops.rows import join_rows

S = TypeVar("S", bound="State")
TensorFn = Callable[[Tensor], Tensor]
# The weights of a memory or a block: matrix name -> tensor. Where they are a memory layer's, each tensor is
# [B, N, H, out, in]: batch, memories, heads.
Weights = dict[str, Tensor]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, those that are one and the same counted once.

    Told apart by storage, not by address: on the meta device there are no addresses.
    """
    held = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t.numel() * t.element_size()
        for t in tensors
    }
    return sum(held.values())


class State:
    """Base of the state dataclasses. Fields are tensors [B, ...], dicts of such tensors, states, or None.

    Subclasses are frozen dataclasses; declaring one registers it as a pytree node and under its class
    name, by which a file of saved states finds it again.
    """

    registry: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        State.registry[cls.__name__] = cls
        pytree.register_pytree_node(
            cls,
            lambda state: ([getattr(state, f.name) for f in dataclasses.fields(state)], None),
            lambda values, _: cls(*values),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def map(self: S, fn: TensorFn) -> S:
        """A new state with `fn` applied to each tensor."""
        return pytree.tree_map_only(Tensor, fn, self)

    def tensors(self) -> list[Tensor]:
        """The tensors of the state, in a fixed order."""
        return [leaf for leaf in pytree.tree_leaves(self) if isinstance(leaf, Tensor)]

    def nbytes(self) -> int:
        """Bytes held by the state's tensors; memory shared between fields counts once."""
        return held_bytes(self.tensors())

    def detach(self: S) -> S:
        """A state of equal values, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def unshared(self: S) -> S:
        """A state of equal values whose tensors are each their own, with the strides of new ones.

        torch.compile makes a graph for each way in which tensors are one and the same, and for other strides,
        also of dimensions of size 1, where they say nothing.
        """
        seen: list[Tensor] = []

        def own(t: Tensor) -> Tensor:
            if any(t is other for other in seen) or not has_new_strides(t):
                t = t.clone(memory_format=torch.contiguous_format)
            seen.append(t)
            return t

        return self.map(own)

    def recordable(self: S) -> S:
        """The state for a call that may record gradients: what was made in inference mode is copied there."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler takes no such tensors
            return self
        return self.map(lambda t: t.clone() if t.is_inference() else t)

    def clone(self: S) -> S:
        return self.map(Tensor.clone)

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        """A state of equal values, without the autograd graph. What is shared between fields stays shared."""
        copies: dict[int, Tensor] = {}

        def copied(t: Tensor) -> Tensor:
            if id(t) not in copies:
                copies[id(t)] = t.detach().clone()
            return copies[id(t)]

        return self.map(copied)

    def to(self: S, device: torch.device | str) -> S:
        """Move to a device. The dtypes stay: states are float32 (or float64) whatever the model is."""
        return self.map(lambda t: t.to(device))

    def select_rows(self: S, index: Tensor) -> S:
        """Rows `index` [B'] of the batch, in that order: beam reordering, slicing one row, duplicating."""
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def slice_rows(self: S, rows: slice) -> S:
        """Successive rows of the batch, as views."""
        return self.map(lambda t: t[rows])

    def repeat_rows(self: S, repeats: int) -> S:
        """Each row `repeats` times in succession, as `generate` expands a batch for beams."""
        return self.map(lambda t: t.repeat_interleave(repeats, dim=0))

    @staticmethod
    def join_rows(states: Sequence[S]) -> S:
        """The states of several batches as that of one. What each shares between fields stays shared.

        Keys and values of attention may be of different numbers of tokens, see `ops.rows.join_rows`.
        """
        joined: S = join_rows(states)
        return joined

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat `{"field": t, "field.key": t}` for a safetensors file; fields that are None are left out."""
        flat: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                flat[field.name] = value
            elif isinstance(value, dict | State):
                inner = value.to_tensors() if isinstance(value, State) else value
                flat.update({f"{field.name}.{key}": t for key, t in inner.items()})
        return flat

    @classmethod
    def from_tensors(cls: type[S], flat: dict[str, Tensor]) -> S:
        """The inverse of `to_tensors`."""
        values: dict[str, Any] = {f.name: None for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name, tensor in flat.items():
            field, _, key = name.partition(".")
            if field not in values:
                raise ValueError(
                    f"{cls.__name__} has no field {field!r} (got {name!r}); it has {', '.join(values)}. "
                    "The file was written by another version or is damaged."
                )
            if key:
                values[field] = {**(values[field] or {}), key: tensor}
            else:
                values[field] = tensor
        for name, inner in _inner_states(cls).items():
            if values[name] is not None:
                values[name] = inner.from_tensors(values[name])
        return cls(**values)


def _inner_states(cls: type[State]) -> dict[str, type[State]]:
    """The fields of a state that are states themselves, by their annotation."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if isinstance(hints[field.name], type) and issubclass(hints[field.name], State)
    }
