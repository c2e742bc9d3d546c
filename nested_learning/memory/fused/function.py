"""A run of whole chunks as one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.running import Inputs as StepInputs
from nested_learning.memory.running import Readouts

Weights = Mapping[str, Tensor]  # matrix name -> [B, N, H, out, in]
# The same run by the generic step: y [B, H, T, d], weights and momentum after the last chunk, from the
# initial memories, weights and momentum before the first chunk (both anchors), inputs and readouts.
Generic = Callable[
    [Weights, Weights, Weights | None, StepInputs, Readouts | None], tuple[Tensor, Weights, Weights | None]
]


class Kernel(Protocol):
    """Forward and backward passes of a run. Its outputs are y, running weights, and last the surprise."""

    def forward(self, tensors: Sequence[Tensor], saved: list[Any] | None) -> tuple[Any, ...]:
        """All chunks; what the backward pass needs of each goes into `saved`."""

    def backward(
        self,
        tensors: Sequence[Tensor],
        after: Sequence[Tensor],
        saved: Sequence[Any],
        gy: Tensor,
        g_after: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """The gradients to `tensors`, from those to y and to the running weights `after` the last chunk."""

    def reference(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The differentiable outputs by the generic step."""


def apply(kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The kernel's outputs, differentiable where a tensor asks for it."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Run.apply(kernel, *tensors)
    return kernel.forward(tensors, None)


class _Run(torch.autograd.Function):
    """The kernel's two passes; where the backward pass is itself to be differentiated, the reference's."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *tensors: Tensor) -> tuple[Any, ...]:
        saved: list[Any] = []
        outputs = kernel.forward(tensors, saved)
        leaves, ctx.spec = pytree.tree_flatten(saved)
        ctx.kernel, ctx.inputs, after = kernel, len(tensors), outputs[1:-1]
        if outputs[-1] is not None:
            ctx.mark_non_differentiable(outputs[-1])
        ctx.save_for_backward(*tensors, *after, *leaves)
        return outputs

    @staticmethod
    def backward(ctx: Any, gy: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        g_after = grads[:-1]  # the last is the surprise's
        tensors, rest = everything[: ctx.inputs], everything[ctx.inputs :]
        after, leaves = rest[: len(g_after)], rest[len(g_after) :]
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(ctx.kernel, tensors, (gy, *g_after))
        with torch.autocast(gy.device.type, enabled=False):
            saved = pytree.tree_unflatten(list(leaves), ctx.spec)
            return None, *ctx.kernel.backward(tensors, after, saved, gy, g_after)


def _differentiable_backward(
    kernel: Kernel, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The same gradients from the generic step, as a graph that can be differentiated again."""
    # Views, as one input may be computed from another: W2 at the start of a sequence is W2_init, expanded.
    inputs = [t.view_as(t) for t in tensors]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            kernel.reference(inputs),
            wanted,
            grads,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if t.requires_grad else None for t in tensors]


def chunks_of(size: int, T: int) -> list[slice]:
    """The columns of each chunk."""
    return [slice(start, start + size) for start in range(0, T, size)]
