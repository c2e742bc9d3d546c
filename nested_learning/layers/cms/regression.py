"""The update "regression": a block as an associative memory of projections of its own input (eq 71).

Per token the block's branch f(W; ·) is to map a key to a value, both made from the block's input u:

    k = norm(P_k u),  v = RMSnorm(P_v u),  L = ‖f(W; k) − v‖² / 2D,

with the block's own norm, so that keys lie where its inputs do, and values of norm √D **(ours, as is the
1/D: gradients do not grow with the width)**. All gradients of a chunk are taken at the weights of its start,
hence in a few matrix products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.memory.state import Weights
from nested_learning.ops import delta_rule

_DELTA_RULE_CHUNK = 64  # tokens per triangular solve; changes the cost, not the result


class KeyValue(nn.Module):
    """Keys and values for the memory that a block is.

    Args:
        hidden_size: D.
        eps: epsilon of the values' norm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [B, T, D] for inputs x [B, T, D], which the block's norm is yet to normalise, and values of
        `dtype`, normalised."""
        key = self.key(x).to(x.dtype)  # under autocast too
        return key, F.rms_norm(self.value(x).to(dtype), (self.hidden_size,), eps=self.eps)


def summed_gradients(
    weights: Weights,
    key: Tensor,
    value: Tensor,
    activation: str,
    learn: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Weights, Tensor, Tensor]:
    """Gradients of the chunk's loss Σ_t L_t, all at the same weights.

    Args:
        weights: W, matrices [B, out, in].
        key, value: k, v [B, T, D].
        activation: σ of the block.
        learn: [B, T] bool, the tokens whose losses are summed; None: all.
        scale: [e] factors of the hidden units.

    Returns:
        Σ_t ∂L_t/∂W of each matrix [B, out, in]; the hidden units φ [B, T, e] at the keys; the errors
        (f(W; k) − v) / D [B, T, D], zero where nothing is learned.
    """
    phi, slopes = _hidden_units(weights, key, activation)
    if scale is not None:
        phi = phi * scale
    error = (phi @ weights["down.weight"].mT - value) / value.shape[-1]
    if learn is not None:
        error = error * learn.unsqueeze(-1)
    back = error @ weights["down.weight"]  # ∂L/∂φ
    if scale is not None:
        back = back * scale
    grads = {name: (back * slope).mT @ key for name, slope in slopes.items()}
    return {**grads, "down.weight": error.mT @ phi}, phi, error


def _hidden_units(weights: Weights, key: Tensor, activation: str) -> tuple[Tensor, Weights]:
    """φ [B, T, e] at keys [B, T, D], and per matrix before φ the slope ∂φ/∂(W k) [B, T, e]."""
    a = key @ weights["up.weight"].mT
    if activation == "swiglu":  # φ = b σ(b) a
        b = key @ weights["gate.weight"].mT
        s = b.sigmoid()
        slopes = {"up.weight": b * s, "gate.weight": a * s * (1 + b * (1 - s))}
        return b * s * a, slopes
    if activation == "gelu":  # φ = a Φ(a) with the normal distribution's Φ, whose density is Φ′
        cumulative = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
        slopes = {"up.weight": cumulative + a * density}
        return a * cumulative, slopes
    r = a.relu()
    slopes = {"up.weight": 2 * r}
    return r * r, slopes


def delta_rule_gradient(
    anchor: Tensor, total: Tensor, phi: Tensor, value: Tensor, lr: Tensor | float, learn: Tensor | None
) -> Tensor:
    """Summand of the rule "dgd" to the sum of the output matrix, in the place of its gradient.

    Token by token W ← W (I − η′ φφᵀ) + η′ v φᵀ with η′ = η / (1 + η‖φ‖²), exact for any norm of φ: eq 57 with
    the dot-product objective. The weights that are read stay the anchor until the boundary; until then the
    sum holds how far W has gone, with the sign of a gradient: `total` = anchor − W.

    Args:
        anchor: weights of the last boundary [B, D, e].
        total: the sum so far [B, D, e].
        phi: hidden units φ [B, T, e] of the anchor.
        value: v [B, T, D].
        lr: η.
        learn: [B, T] bool; None: all tokens.

    Returns:
        The difference to the sum after these tokens [B, D, e].
    """
    rate = lr / (1 + lr * phi.square().sum(-1))  # [B, T]
    if learn is not None:
        rate = rate * learn
    _, W, _ = delta_rule.chunked(
        anchor - total,
        phi,
        rate.unsqueeze(-1) * value,
        torch.zeros_like(rate),
        erase=rate,
        chunk_size=_DELTA_RULE_CHUNK,
    )
    return anchor - W - total
