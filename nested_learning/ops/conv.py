"""Causal depthwise convolution whose history is passed in."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """out_t = Σ_j weight[:, j] x_{t+j}: every position of x that has a full window.

    A sum over the K taps rather than F.conv1d: for depthwise kernels of a few taps it spares the
    transposition to channels-first, and its backward pass is no slower on a CPU.

    Args:
        x: [B, K−1+T, channels], the K−1 inputs before the sequence (zeros at its beginning) in front.
        weight: [channels, 1, K] as in nn.Conv1d(groups=channels).

    Returns: [B, T, channels].
    """
    taps = weight.squeeze(1).unbind(-1)
    T = x.shape[1] - len(taps) + 1
    out = x[:, :T] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        out = torch.addcmul(out, x[:, j : j + T], tap)
    return out
