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

from nested_learning.layers.cms.block import MLPBlock
from nested_learning.layers.cms.writer import DELTA_RULE_MATRIX, Tensors
from nested_learning.ops import delta_rule

_DELTA_RULE_CHUNK = 64  # tokens per triangular solve; changes the cost, not the result


class KeyValue(nn.Module):
    """Keys and values for the memory that a block is.

    Args:
        hidden_size: D.
        eps: of the values' norm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, block: MLPBlock, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normalised keys and values [B, T, D] of `dtype` for inputs x [B, T, D]."""
        key = block.norm(self.key(x).to(x.dtype)).to(dtype)  # under autocast too
        return key, F.rms_norm(self.value(x).to(dtype), (self.hidden_size,), eps=self.eps)


class Features:
    """Hidden units φ [B, T, e] at keys [B, T, D], and what leads back from them to the matrices."""

    def __init__(self, weights: Tensors, key: Tensor, activation: str, scale: Tensor | None) -> None:
        self._key, self._scale = key, scale
        a = key @ weights["up.weight"].mT
        if activation == "swiglu":
            b = key @ weights["gate.weight"].mT
            s = b.sigmoid()
            self._slopes = {"up.weight": b * s, "gate.weight": a * s * (1 + b * (1 - s))}
            phi = b * s * a
        elif activation == "gelu":
            cumulative = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
            density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
            self._slopes, phi = {"up.weight": cumulative + a * density}, a * cumulative
        else:
            r = a.relu()
            self._slopes, phi = {"up.weight": 2 * r}, r * r
        self.phi = phi if scale is None else phi * scale

    def gradients(self, back: Tensor) -> Tensors:
        """Sums over the tokens of the gradients of all matrices before φ, from ∂L/∂φ [B, T, e]."""
        back = back if self._scale is None else back * self._scale
        return {name: (back * slope).mT @ self._key for name, slope in self._slopes.items()}


def summed_gradients(
    weights: Tensors,
    key: Tensor,
    value: Tensor,
    activation: str,
    write: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensors, Tensor]:
    """Σ_t ∂L_t/∂W of each matrix at `weights` [B, out, in], and φ [B, T, e].

    Args:
        key, value: [B, T, D].
        activation: of the block.
        write: [B, T] bool, the tokens that count; None: all.
        scale: [e] factors of the hidden units.
    """
    grads, phi, _ = _gradients(weights, key, value, activation, write, scale)
    return grads, phi


def chunk_loss_and_gradients(
    weights: Tensors, key: Tensor, value: Tensor, activation: str, write: Tensor | None = None
) -> tuple[Tensor, Tensors]:
    """Σ_t L_t over all rows and tokens, 0-D, and Σ_t ∂L_t/∂W; arguments as of `summed_gradients`."""
    grads, _, error = _gradients(weights, key, value, activation, write, None)
    return 0.5 * value.shape[-1] * error.square().sum(), grads


def _gradients(
    weights: Tensors,
    key: Tensor,
    value: Tensor,
    activation: str,
    write: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensors, Tensor, Tensor]:
    """Σ_t ∂L_t/∂W, φ [B, T, e], and (f(W; k) − v) / D [B, T, D], zero where nothing is learned."""
    features = Features(weights, key, activation, scale)
    error = (features.phi @ weights["down.weight"].mT - value) / value.shape[-1]
    if write is not None:
        error = error * write.unsqueeze(-1)
    grads = features.gradients(error @ weights["down.weight"])
    return {**grads, "down.weight": error.mT @ features.phi}, features.phi, error


def delta_rule_change(
    anchor: Tensor, change: Tensor, phi: Tensor, value: Tensor, lr: Tensor | float, write: Tensor | None
) -> Tensor:
    """The output matrix's change within its chunk, token by token (eq 57 with the dot-product objective).

    W ← W (I − η′ φφᵀ) + η′ v φᵀ with η′ = η / (1 + η‖φ‖²), exact for any norm of φ, from W = anchor + change;
    φ is that of the anchor. The weights that are read stay the anchor until the boundary.

    Args:
        anchor, change: [B, D, e].
        phi: [B, T, e]; value: [B, T, D].

    Returns: the change after these tokens [B, D, e].
    """
    rate = lr / (1 + lr * phi.square().sum(-1))  # [B, T]
    if write is not None:
        rate = rate * write
    _, W, _ = delta_rule.chunked(
        anchor + change,
        phi,
        rate.unsqueeze(-1) * value,
        torch.zeros_like(rate),
        erase=rate,
        chunk_size=_DELTA_RULE_CHUNK,
    )
    return W - anchor


def chunk_gradients(
    weights: Tensors,
    sums: Tensors,
    key: Tensor,
    value: Tensor,
    block: MLPBlock,
    write: Tensor | None,
    scale: Tensor | None,
    delta_rule_lr: Tensor | float | None,
) -> Tensors:
    """What these tokens add to a level's sums; `delta_rule_lr` is the rate with the rule "dgd", else None."""
    grads, phi = summed_gradients(weights, key, value, block.activation, write, scale)
    if delta_rule_lr is not None:
        name = DELTA_RULE_MATRIX
        change = delta_rule_change(weights[name], -sums[name], phi, value, delta_rule_lr, write)
        grads[name] = -change - sums[name]
    return grads
