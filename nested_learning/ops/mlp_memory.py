"""The residual two-layer memory M(x) = x + W1 n(silu(W2 x)): forward pass and its gradient by hand.

n(h) = h / sqrt(‖h‖² + floor²) makes the input of W1 unit-norm, as DGD requires, and the floor keeps its
gradient finite where the hidden vector fades (spec section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN_FLOOR = 0.1


class Hidden(NamedTuple):
    """The hidden layer at one input and what its gradient needs."""

    unit: Tensor  # [..., e] n(silu(z)), the input of W1
    z: Tensor  # [..., e] pre-activation, W2 x
    inverse_norm: Tensor  # [..., 1] 1 / sqrt(‖silu(z)‖² + floor²)


def hidden(z: Tensor) -> Hidden:
    """The hidden layer from its pre-activation z = W2 x [..., e]."""
    h = F.silu(z)
    inverse_norm = (h.square().sum(-1, keepdim=True) + HIDDEN_FLOOR**2).rsqrt()
    return Hidden(h * inverse_norm, z, inverse_norm)


def read(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """M(x). x [..., T, d], W1 [..., d, e], W2 [..., e, d] -> [..., T, d]."""
    return x + hidden(x @ W2.mT).unit @ W1.mT


def hidden_gradient(at: Hidden, g_out: Tensor, W1: Tensor) -> Tensor:
    """∂L/∂z [..., T, e] from g_out = ∂L/∂M [..., T, d]: back through W1, n and silu.

    With u = n(h): ∂L/∂h = (g − u ⟨u, g⟩) / sqrt(‖h‖² + floor²), where g = W1ᵀ g_out.
    """
    g = g_out @ W1
    g = (g - at.unit * (at.unit * g).sum(-1, keepdim=True)) * at.inverse_norm
    s = torch.sigmoid(at.z)
    return g * (s * (1 + at.z * (1 - s)))


def clip_norm(g: Tensor, limit: float = 1.0) -> Tensor:
    """g scaled down along the last dimension to a norm of at most `limit`."""
    # the bound inside the root, not outside: the gradient of 1/‖g‖ is not finite at g = 0
    return g * (limit * g.square().sum(-1, keepdim=True).clamp_min(limit**2).rsqrt())
