"""Steps per head that all attention layers share: the check of sizes, norms, rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nested_learning._checks import fits
from nested_learning.layers.token_inputs import RMSNorm


def check_rotary(hidden_size: int, num_heads: int, rope_theta: float | None) -> None:
    """ValueError unless theta is positive and heads have a whole, even width, whose halves `rotate` pairs.

    With None nothing is rotated, and any whole width will do.
    """
    if hidden_size % num_heads or (rope_theta is not None and (hidden_size // num_heads) % 2):
        even = "a whole" if rope_theta is None else "an even"
        raise ValueError(
            f"attention needs {even} head width hidden_size / num_heads, got {hidden_size} / {num_heads}"
        )
    if rope_theta is not None and not (fits(rope_theta, float) and 0 < rope_theta < math.inf):
        raise ValueError(
            f"rope_theta must be a positive number, or None for no positions, got {rope_theta!r}"
        )


def normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """norm(x) in the dtype of its scales: under autocast x is in half precision, the scales are float32."""
    return x if norm is None else norm(x.to(norm.weight.dtype))


def rotate(x: Tensor, positions: Tensor, theta: float | None) -> Tensor:
    """Rotary position embedding of x [B, H, T, d] at positions [B or 1, T]; x itself where theta is None.

    Pairs dimension i with i + d/2, rotated by position · theta^(−2i/d). Computed in float32 at least; the
    frequencies are no buffer, so nothing has to survive a load from a checkpoint.
    """
    if theta is None:
        return x
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = positions[:, None, :, None].to(dtype) * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
