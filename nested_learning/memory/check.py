"""A debug switch that finds where a number first stops being finite: NESTED_LEARNING_CHECK=1.

Off by default: each check waits for the device. Nothing is repaired: the first value that is not finite
raises FloatingPointError with its layer, memory, chunk, row and name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

VARIABLE = "NESTED_LEARNING_CHECK"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

_layer: ContextVar[str | None] = ContextVar("checked_layer", default=None)


def enabled() -> bool:
    """Whether NESTED_LEARNING_CHECK asks for checks: 1, true, yes or on; unset, 0, false, no or off for none.

    Never within torch.compile, whose graphs cannot look at values: find the place in eager mode.

    Raises:
        ValueError: for any other value.
    """
    if torch.compiler.is_compiling():
        return False
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise ValueError(f"{VARIABLE} must be 1 (check) or 0 (do not), got {os.environ[VARIABLE]!r}")


@contextmanager
def layer_name(name: str) -> Iterator[None]:
    """Name the layer that runs within the `with` block, for the messages of the checks in it.

    Blocks nest: an inner name is joined to the outer with a dot.
    """
    outer = _layer.get()
    token = _layer.set(name if outer is None else f"{outer}.{name}")
    try:
        yield
    finally:
        _layer.reset(token)


def scope(name: str) -> AbstractContextManager[None]:
    """`layer_name` where checks are on, else nothing: a compiled model must not meet a context variable."""
    return layer_name(name) if enabled() else nullcontext()


def check_values(kind: str, **tensors: Tensor | None) -> None:
    """Raise unless the tensors [B, ...] that enter or leave a layer are finite; None is skipped.

    Args:
        kind: what they are to the layer, for the message: "input", "state", "output".

    Raises:
        FloatingPointError: with the layer, the tensor's name and the first row with such a value.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not _finite(tensor):
            raise _error(f"in its {kind} {name}", tensor)


def check_step(
    memories: tuple[str, ...],
    chunk: int,
    signals: Mapping[str, Tensor | None],
    weights: Mapping[str, Tensor | None],
) -> None:
    """Raise unless one chunk of a layer's memories is finite.

    Signals are looked at first, as they are made before the weights move. It does not ask `enabled()`: the
    caller does, once for all chunks.

    Args:
        memories: names along the memory axis of the weights.
        chunk: index of the chunk within the call, from 0.
        signals: by name, tensors [B, ...] that all memories share, such as k, v, q, eta, y; None is skipped.
        weights: by name, tensors [B, N, ...] with N = len(memories), such as W1 and the targets v̂.

    Raises:
        FloatingPointError: with the layer, the memory, the chunk, the tensor's name and the row.
        ValueError: for weights whose second dimension is not the number of memories.
    """
    for name, tensor in signals.items():
        if tensor is not None and not _finite(tensor):
            raise _error(f"in {name} of chunk {chunk}", tensor)
    for name, tensor in weights.items():
        if tensor is None:
            continue
        if tensor.dim() < 2 or tensor.shape[1] != len(memories):
            raise ValueError(
                f"{name} must be [B, {len(memories)}, ...] with one entry for each of the memories "
                f"{'/'.join(memories)}, got {tuple(tensor.shape)}"
            )
        if not _finite(tensor):
            first = next(i for i in range(len(memories)) if not _finite(tensor[:, i]))
            raise _error(f"in {name} of memory {memories[first]!r}, chunk {chunk}", tensor[:, first])


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def _error(where: str, tensor: Tensor) -> FloatingPointError:
    """`tensor` [B, ...] has an entry that is not finite."""
    bad = ~tensor.detach().isfinite()
    row = int(bad.flatten(1).any(1).nonzero()[0]) if bad.dim() > 1 else int(bad.nonzero()[0])
    kinds = [
        kind for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)) if bool(test(tensor).any())
    ]
    layer = _layer.get()
    return FloatingPointError(
        f"{'a layer' if layer is None else f'layer {layer!r}'} has {' and '.join(kinds)} {where}: "
        f"{int(bad.sum())} of {bad.numel()} entries, the first in row {row} of the batch"
    )
