"""Scaling by a norm: L2 normalisation of rows with a floor, clipping, and units for tiny and huge numbers.

A sum of squares leaves float32 where the numbers lie below 1e-19 or above 1e19, long before they do. Where
such numbers may come, `magnitude` gives units in which the squares do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.context import forward_mode

UNIT_FLOOR = 1e-3


@torch.no_grad()
def magnitude(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The power of two s with s ≤ max |x| < 2s along `dim`, which stays with size one; all of x by default.

    x / s is exact and its squares neither underflow nor overflow, so ‖x‖ = s ‖x / s‖ has the bits of ‖x‖
    wherever that is right. 1 for zeros, and the smallest normal number for what is smaller. A constant for
    autograd.
    """
    dim = tuple(range(x.ndim)) if dim is None else dim
    largest = x.abs().amax(dim, keepdim=True)
    largest = torch.where(largest > 0, largest.clamp(min=torch.finfo(x.dtype).tiny), 1)
    return largest / (2 * torch.frexp(largest).mantissa)


def unit(x: Tensor, floor: float = UNIT_FLOOR) -> Tensor:
    """x / sqrt(‖x‖² + floor²) along the last dimension.

    Close to x/‖x‖ for ‖x‖ well above `floor`, and smooth with a gradient of at most 1/floor at zero,
    where x/‖x‖ has none.
    """
    return scale_rows(x, floor**2, 0.0)[0]


def clip_norm(x: Tensor, limit: float = 1.0) -> Tensor:
    """x scaled down along the last dimension to a norm of at most `limit`."""
    if limit == 1.0:
        return scale_rows(x, 0.0, 1.0)[0]
    return limit * scale_rows(x, 0.0, limit**2)[0]


def scale_rows(x: Tensor, offset: float, least: float) -> tuple[Tensor, Tensor]:
    """(x · f, f) with f = 1 / sqrt(max(‖x‖² + offset, least)), f [..., 1]."""
    if forward_mode():
        f = (x.square().sum(-1, keepdim=True) + offset).clamp_min(least).rsqrt()
        return x * f, f
    if not torch.is_grad_enabled():
        return _ScaleRows.forward(x, offset, least)  # apply() takes as long as the arithmetic on one token
    return _ScaleRows.apply(x, offset, least)


class _ScaleRows(torch.autograd.Function):
    """With y = x f: ∂L/∂x = f (g − y ⟨y, g⟩), half the passes over memory that autograd's chain takes.

    The backward pass is itself made of differentiable operations on inputs and outputs, so that second
    derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, offset: float, least: float) -> tuple[Tensor, Tensor]:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        f = (square + offset).clamp_min(least).rsqrt()
        return x * f, f

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.least = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_f: Tensor) -> tuple[Tensor, None, None]:
        y, f = ctx.saved_tensors
        along = (y * g).sum(-1, keepdim=True) + f * g_f
        if ctx.least:
            along = along * (f.square() * ctx.least < 1)  # where the bound holds, f does not depend on x
        return torch.addcmul(g, y, along, value=-1) * f, None, None
