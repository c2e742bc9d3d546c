"""Causal depthwise convolution whose history is passed in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """out_t = Σ_j weight[:, j] x_{t+j}: every position of x that has a full window.

    Args:
        x: [B, K−1+T, channels], the K−1 inputs before the sequence (zeros at its beginning) in front.
        weight: [channels, 1, K] as in nn.Conv1d(groups=channels).

    Returns: [B, T, channels].
    """
    return F.conv1d(x.mT, weight, groups=weight.shape[0]).mT
