"""The residual two-layer memory M(x) = x + W1 n(silu(W2 x)): forward pass and its gradient by hand.

n(h) = h / sqrt(‖h‖² + floor²) makes the input of W1 unit-norm, as DGD requires, and the floor keeps its
gradient finite where the hidden vector fades (spec section 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.norm import scale_rows

HIDDEN_FLOOR = 0.1


class Hidden(NamedTuple):
    """The hidden layer at one input and what its gradient needs."""

    unit: Tensor  # [..., e] n(silu(z)), the input of W1
    z: Tensor  # [..., e] pre-activation, W2 x
    inverse_norm: Tensor  # [..., 1] 1 / sqrt(‖silu(z)‖² + floor²)


def hidden(z: Tensor) -> Hidden:
    """The hidden layer from its pre-activation z = W2 x [..., e]."""
    unit, inverse_norm = scale_rows(F.silu(z), HIDDEN_FLOOR**2, 0.0)
    return Hidden(unit, z, inverse_norm)


def hidden_gradient(at: Hidden, g_out: Tensor, W1: Tensor) -> Tensor:
    """∂L/∂z [..., T, e] from g_out = ∂L/∂M [..., T, d]: back through W1, n and silu.

    With u = n(h): ∂L/∂h = (g − u ⟨u, g⟩) / sqrt(‖h‖² + floor²), where g = W1ᵀ g_out.
    """
    return _ThroughHidden.apply(*at, g_out @ W1)


class _ThroughHidden(torch.autograd.Function):
    """r = silu′(z) f (g − u ⟨u, g⟩), and its derivatives to all four arguments by hand.

    Autograd's chain for this takes about twice the passes over memory. Built from differentiable
    operations on the arguments alone, so that second derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, z: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return _through_silu(_across(u, g) * f, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g_r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, z, f, g = ctx.saved_tensors
        along = (u * g).sum(-1, keepdim=True)
        across = torch.addcmul(g, u, along, value=-1)
        at_h = _through_silu(g_r, z)
        g_f = (at_h * across).sum(-1, keepdim=True)
        at_h = at_h * f
        along_h = (u * at_h).sum(-1, keepdim=True)
        g_u = -torch.addcmul(at_h * along, g, along_h)
        g_g = torch.addcmul(at_h, u, along_h, value=-1)
        return g_u, across * f * g_r * _silu_second(z), g_f, g_g


def _across(u: Tensor, g: Tensor) -> Tensor:
    """g − u ⟨u, g⟩, the part of g across the unit vector u."""
    return torch.addcmul(g, u, (u * g).sum(-1, keepdim=True), value=-1)


def _through_silu(g: Tensor, z: Tensor) -> Tensor:
    """g silu′(z): PyTorch's own kernel, which cannot be differentiated again, where that is not asked for."""
    if torch.is_grad_enabled():
        s = torch.sigmoid(z)
        return g * s * (1 + z * (1 - s))
    return torch.ops.aten.silu_backward(g, z)


def _silu_second(z: Tensor) -> Tensor:
    """silu″(z) = s (1 − s) (2 + z (1 − 2 s)), s = sigmoid(z)."""
    s = torch.sigmoid(z)
    return torch.addcmul(s, s, s, value=-1) * torch.addcmul(z + 2, z, s, value=-2)
