"""Steps per head that all attention layers share: the check of sizes, norms, rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.token_inputs import RMSNorm


def check_rotary(hidden_size: int, num_heads: int, rope_theta: float) -> None:
    """ValueError unless theta is positive and heads have a whole, even width, whose halves `rotate` pairs."""
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ValueError(
            f"attention needs an even head width hidden_size / num_heads, got {hidden_size} / {num_heads}"
        )
    if not rope_theta > 0:
        raise ValueError(f"rope_theta must be positive, got {rope_theta}")


def normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """norm(x) in the dtype of its scales: under autocast x is in half precision, the scales are float32."""
    return x if norm is None else norm(x.to(norm.weight.dtype))


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x [B, H, T, d] at positions [B or 1, T].

    Pairs dimension i with i + d/2, rotated by position · theta^(−2i/d). Computed in float32 at least; the
    frequencies are no buffer, so nothing has to survive a load from a checkpoint.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = positions[:, None, :, None].to(dtype) * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
