"""Keep a function's inputs for the backward pass and compute the rest again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from nested_learning.ops.context import forward_mode, transformed

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
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    if forward_mode():
        return function(*arguments)
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


class _Surroundings:
    """Autocast around a call, and the generators that it may draw from, as the dropout of an adapter does.

    A device without the one or the other (meta) has nothing to keep.
    """

    def __init__(self, device: str) -> None:
        self.device, self.random = device, _random_state(device)
        self.autocast: tuple[str, torch.dtype, bool] | None = None
        if torch.amp.is_autocast_available(device):
            self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same autocast, and the same numbers drawn; the generators go on as if nothing had been."""
        before = _random_state(self.device)
        _set_random_state(self.device, self.random)
        try:
            with nullcontext() if self.autocast is None else torch.autocast(*self.autocast):
                yield
        finally:
            _set_random_state(self.device, before)


def _random_state(device: str) -> list[Tensor]:
    own = [] if device in ("cpu", "meta") else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def _set_random_state(device: str, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.count, ctx.surroundings = call, count, _Surroundings(tensors[0].device.type)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        outputs = call(tensors[:count])
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        inputs, parameters = given[: ctx.count], given[ctx.count :]
        gradient = _Gradient(ctx.call, parameters, ctx.surroundings)
        if torch.is_grad_enabled():  # it is to be differentiated itself: a function of inputs and grads
            return None, None, *recomputed(gradient, (inputs, grads), parameters)
        return None, None, *gradient(inputs, grads)


class _Gradient:
    """The gradient of a call to its inputs and parameters, as a function that `recomputed` takes.

    The call runs on leaves. On inputs with a history, the search for the parameters would go on there: they
    count in earlier calls too, whose gradients are not this call's, and which would each search again.
    """

    def __init__(self, call: _Call, parameters: Sequence[Tensor], surroundings: _Surroundings) -> None:
        self.call, self.parameters, self.surroundings = call, parameters, surroundings

    def __call__(self, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients, None where none is wanted.

        With gradients enabled, as `recomputed` calls it again, the inputs are leaves and the result is a
        function of them.
        """
        create_graph = torch.is_grad_enabled()
        with self.surroundings.again(), torch.enable_grad():
            if not create_graph:
                inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
            outputs = self.call(inputs)
            both = [*inputs, *self.parameters]
            wanted = [t for t in both if t.requires_grad]
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            if not pairs:
                return (None,) * len(both)
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        return tuple(next(found) if t.requires_grad else None for t in both)
