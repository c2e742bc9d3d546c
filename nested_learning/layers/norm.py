"""RMS norm of layers, blocks and models."""

from __future__ import annotations

from torch import Tensor, nn

from nested_learning.ops.norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension, with scales and an epsilon, in fewer kernels on a CPU.

    Args:
        size: D, the width that is normalised over.
        eps: added to the mean square.
    """

    weight: nn.Parameter
    eps: float

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
