"""Pieces of the residual MLP memory M(x) = x + W1 n(σ(W2 x)): forward, and the inner gradient by hand.

n(h) = h / sqrt(‖h‖² + floor²) makes the input of W1 unit-norm, as DGD requires, and the floor keeps its
gradient finite where the hidden vector fades (spec section 3). Every gradient is made of operations that can
be differentiated again: the outer gradient flows through the inner one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.context import forward_mode
from nested_learning.ops.norm import scale_rows

HIDDEN_FLOOR = 0.1
# Of the layer norm at the output of MIRAS' memories, whose gradient grows as the inverse of the spread.
OUTPUT_FLOOR = 0.1
Activation = Literal["silu", "gelu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


class Hidden(NamedTuple):
    """A hidden layer at one input and what its gradient needs."""

    unit: Tensor  # [..., e] n(σ(z)), the input of the next matrix
    z: Tensor  # [..., e] pre-activation
    inverse_norm: Tensor  # [..., 1] 1 / sqrt(‖σ(z)‖² + floor²)


def hidden(z: Tensor, activation: Activation = "silu") -> Hidden:
    """The hidden layer from its pre-activation z [..., e]."""
    unit, inverse_norm = normalise(activate(z, activation))
    return Hidden(unit, z, inverse_norm)


def normalise(h: Tensor) -> tuple[Tensor, Tensor]:
    """n(h) [..., e] and 1 / sqrt(‖h‖² + floor²) [..., 1]."""
    return scale_rows(h, HIDDEN_FLOOR**2, 0.0)


def activate(z: Tensor, activation: Activation) -> Tensor:
    """σ(z)."""
    return F.silu(z) if activation == "silu" else F.gelu(z)


def output_norm(z: Tensor) -> Tensor:
    """LN(z) = (z − mean) / sqrt(variance + floor²) along the last dimension, without weights."""
    return F.layer_norm(z, z.shape[-1:], eps=OUTPUT_FLOOR**2)


def hidden_gradient(at: Hidden, g_out: Tensor, W1: Tensor) -> Tensor:
    """∂L/∂z [..., T, e] from g_out = ∂L/∂M [..., T, d]: back through W1, n and silu.

    With u = n(h): ∂L/∂h = (g − u ⟨u, g⟩) / sqrt(‖h‖² + floor²), where g = W1ᵀ g_out.
    """
    return through_hidden(at, g_out @ W1)


def through_hidden(at: Hidden, g: Tensor, activation: Activation = "silu") -> Tensor:
    """∂L/∂z [..., e] from g = ∂L/∂n(σ(z)) [..., e]."""
    if activation == "silu" and not forward_mode():
        return _ThroughHidden.apply(*at, g)
    return through_activation(through_norm(g, at.unit, at.inverse_norm), at.z, activation)


def through_norm(g: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    """∂L/∂h [..., e] from g = ∂L/∂n(h), where unit = n(h)."""
    return _across(unit, g) * inverse_norm


def through_activation(g: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """g σ′(z)."""
    if activation == "silu":
        return g * torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    below = 0.5 * (1 + torch.erf(z * 0.5**0.5))  # Φ(z)
    return g * (below + z * torch.exp(-0.5 * z.square()) * (2 * torch.pi) ** -0.5)


def through_output_norm(g: Tensor, z: Tensor) -> Tensor:
    """∂L/∂z [..., d] from g = ∂L/∂LN(z): (g − mean(g) − y mean(g y)) / sqrt(variance + floor²), y = LN(z)."""
    inverse = (z.var(-1, correction=0, keepdim=True) + OUTPUT_FLOOR**2).rsqrt()
    y = (z - z.mean(-1, keepdim=True)) * inverse
    return (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True)) * inverse


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
    """g silu′(z): PyTorch's own kernel, which cannot be differentiated again nor converted to ONNX, where
    neither is asked for."""
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        s = torch.sigmoid(z)
        return g * s * (1 + z * (1 - s))
    return torch.ops.aten.silu_backward(g, z)


def _silu_second(z: Tensor) -> Tensor:
    """silu″(z) = s (1 − s) (2 + z (1 − 2 s)), s = sigmoid(z)."""
    s = torch.sigmoid(z)
    return torch.addcmul(s, s, s, value=-1) * torch.addcmul(z + 2, z, s, value=-2)
