"""Keep a function's inputs for the backward pass and compute the rest again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from nested_learning.ops.context import transformed

Out = TypeVar("Out")


def recomputed(function: Callable[..., Out], arguments: tuple[Any, ...], parameters: Sequence[Tensor]) -> Out:
    """`function(*arguments)`, of which the backward pass keeps the inputs alone.

    The same numbers and gradients, second ones too, as `torch.utils.checkpoint`'s, which runs the first pass
    with gradients and lets hooks throw away what it saves: a third slower, and thousands of small objects per
    call that stay between the freed buffers, so that a C heap of long sequences grows to ten times what is
    kept. Here the first pass runs without gradients.

    Args:
        arguments: nested tuples, lists and dicts of tensors and other values.
        parameters: further tensors that the function reads, to which gradients flow.

    Returns: what the function returns, nested likewise.
    """
    if transformed():  # which would have to see into the backward pass
        return function(*arguments)
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False)
    inputs, rebuild = _flatten(arguments)
    call = _Call(function, rebuild)
    outputs = _Recomputed.apply(call, len(inputs), *inputs, *parameters)
    return call.rebuild_outputs(outputs)


Rebuild = Callable[[Sequence[Tensor]], Any]


def _flatten(value: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors of a nested value, each once, and how to build the value from others in their place."""
    leaves, spec = pytree.tree_flatten(value)
    tensors: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.setdefault(id(leaf), leaf)
    number = {key: i for i, key in enumerate(tensors)}
    places = [number.get(id(leaf)) for leaf in leaves]
    # without the tensors, which autograd is to hold
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(given: Sequence[Tensor]) -> Any:
        filled = [o if i is None else given[i] for o, i in zip(others, places, strict=True)]
        return pytree.tree_unflatten(filled, spec)

    return list(tensors.values()), rebuild


class _Call:
    """The function, from tensors to tensors."""

    def __init__(self, function: Callable[..., Any], rebuild_arguments: Rebuild) -> None:
        self.function, self.rebuild_arguments = function, rebuild_arguments
        self.rebuild_outputs: Rebuild

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs, self.rebuild_outputs = _flatten(self.function(*self.rebuild_arguments(tensors)))
        return tuple(outputs)


def _random_state(device: str) -> list[Tensor]:
    """State of the generators that a layer may draw from, such as the dropout of an adapter in it."""
    own = [] if device in ("cpu", "meta") else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


@contextmanager
def _drawing_from(device: str, states: list[Tensor]) -> Iterator[None]:
    """Draw once more what was drawn from these states on; the generators go on as if nothing had been."""
    before = _random_state(device)
    _set_random_state(device, states)
    try:
        yield
    finally:
        _set_random_state(device, before)


def _set_random_state(device: str, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        device = tensors[0].device.type
        ctx.call, ctx.count, ctx.random = call, count, _random_state(device)
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = call(tensors[:count])
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        given = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        with _drawing_from(device, ctx.random), torch.enable_grad(), torch.autocast(device, dtype, enabled):
            # Views where the gradient is to be differentiated: the search for `wanted` ends there, and yet
            # they hang together with the graph.
            inputs = [
                t.view_as(t) if create_graph else t.detach().requires_grad_(t.requires_grad)
                for t in given[: ctx.count]
            ]
            outputs = ctx.call(inputs)
        inputs += given[ctx.count :]
        wanted = [t for t in inputs if t.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
        return None, None, *(next(found) if t.requires_grad else None for t in inputs)
