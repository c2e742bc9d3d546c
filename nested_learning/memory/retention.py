"""Retention of a memory: how its weights fade, and the map from what accumulates to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DecayName = Literal["none", "constant", "gated"]
Form = Literal["linear", "lq", "kl"]
# Keeps ‖A‖^(q−2) away from zero: as A fades, A / ‖A‖^(q−2) would grow without bound.
_LEAST_NORM = 0.1


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Retention α_t, decay 1 − α_t, and the form of the weights.

    Attributes:
        decay: of the accumulated A_t = α_t A_{t−1} + write: "none" α = 1, "constant" RetNet's schedule
            1 − 2^(−5−h) over the heads, "gated" a data-dependent scalar per head and token.
        form: the weights from A. "linear" W = A; "lq" W = A / ‖A‖_q^(q−2), MIRAS' L_q retention (Moneta);
            "kl" W = c softmax(A) along each matrix's input dimension (Memora), c the width of the input, so
            that the mean weight is 1 (ours).
        q: exponent of "lq", at least 2.
    """

    decay: DecayName = "gated"
    form: Form = "linear"
    q: float = 4.0

    def __post_init__(self) -> None:
        if self.decay not in ("none", "constant", "gated"):
            raise ValueError(f"decay must be 'none', 'constant' or 'gated', got {self.decay!r}")
        if self.form not in ("linear", "lq", "kl"):
            raise ValueError(f"form must be 'linear', 'lq' or 'kl', got {self.form!r}")
        if not 2 <= self.q < math.inf:
            raise ValueError(f"q must be a number of at least 2, got {self.q!r}")

    def weights(self, A: Tensor) -> Tensor:
        """The weights [..., out, in] that A [..., out, in] stands for."""
        if self.form == "linear":
            return A
        if self.form == "kl":
            return A.shape[-1] * torch.softmax(A, dim=-1)
        return A * self.scale(A)

    def scale(self, A: Tensor) -> Tensor:
        """1 / ‖A‖_q^(q−2) [..., 1, 1] of "lq", ‖A‖_q over the whole matrix."""
        powers = A.abs().pow(self.q).sum((-2, -1), keepdim=True)
        return powers.clamp_min(_LEAST_NORM**self.q) ** ((2 - self.q) / self.q)

    def init_(self, A: Tensor, weights_std: float) -> None:
        """Fill A so that the weights start as N(0, weights_std²), or as near as the form lets them.

        "lq" starts on the unit sphere of the q-norm, where the map is the identity; "kl" has logits N(0, 1).
        """
        torch.nn.init.normal_(A, std=1.0 if self.form == "kl" else weights_std)
        if self.form == "lq":
            A.div_(A.abs().pow(self.q).sum((-2, -1), keepdim=True) ** (1 / self.q))


def constant_log_decay(num_heads: int, like: Tensor) -> Tensor:
    """RetNet's log α [H], α_h = 1 − 2^(−5−h) for head h = 0 …, as a new tensor of `like`'s kind."""
    heads = torch.arange(num_heads, device=like.device, dtype=torch.float64)
    return torch.log1p(-torch.exp2(-5 - heads)).to(like.dtype)
