"""L2 normalisation with a floor."""

from __future__ import annotations

from torch import Tensor


def unit(x: Tensor, floor: float = 1e-3) -> Tensor:
    """x / sqrt(‖x‖² + floor²) along the last dimension.

    Close to x/‖x‖ for ‖x‖ well above `floor`, and smooth with a gradient of at most 1/floor at zero,
    where x/‖x‖ has none.
    """
    return x * (x.square().sum(-1, keepdim=True) + floor**2).rsqrt()
