"""A causal convolution of a few taps in front of attention, over the real tokens of a row or a document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nested_learning.layers.effective import effective_kernel
from nested_learning.layers.token_inputs import check_count, without_padding
from nested_learning.ops.heads import causal_conv, conv_std, last_inputs
from nested_learning.ops.rows import over_channels


def short_conv(channels: int, size: int) -> nn.Conv1d | None:
    """A depthwise convolution without a bias, None for a size of 0.

    Raises:
        ValueError: unless `size` is 0 or a positive integer.
    """
    check_count("conv_size", size, least=0)
    if not size:
        return None
    conv = nn.Conv1d(channels, channels, size, groups=channels, bias=False)
    nn.init.normal_(conv.weight, std=conv_std(size))
    return conv


def convolved(
    conv: nn.Module,
    x: Tensor,
    tail: Tensor | None,
    real: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_j w_j x_{t−K+1+j} over the K last real tokens of the row up to t, zeros before its first.

    Args:
        conv: of K taps, depthwise, as `short_conv` makes it.
        x: [B, T, channels], zero where it is padded.
        tail: [B, K−1, channels], the last inputs before x; None for zeros.
        real: [B, T] bool, True = real token; None if all are.
        places: [B, T] int64, for each token the number of inputs before it that it may see, such as those of
            its document; anything for padding. None: all.

    Returns: y [B, T, channels], zero at padded positions, and the tail after x: zeros in place of inputs
        that the row's last token may not see.
    """
    kernel = effective_kernel(conv, x).to(x.dtype)
    length, T = kernel.shape[-1] - 1, x.shape[1]
    before = x.new_zeros(len(x), length, x.shape[2]) if tail is None else tail.to(x.dtype)
    if real is None and places is None:
        return causal_conv(torch.cat([before, x], dim=1), kernel), last_inputs(before, x, length)
    if real is None:
        order, count = None, torch.full((len(x),), T, device=x.device)
    else:  # real tokens first, each row's in their order
        order, count = (~real).byte().argsort(dim=1, stable=True), real.sum(1)
        x = x.gather(1, over_channels(order, x))
        places = None if places is None else places.gather(1, order)
    padded = torch.cat([before, x], dim=1)
    y = causal_conv(padded, kernel) if places is None else _within(padded, kernel, places)
    columns = torch.arange(length, device=x.device) + count.unsqueeze(1)  # [B, K−1] of the last inputs
    after = padded.gather(1, over_channels(columns, padded))
    if places is not None:
        # What the next token may see: the last one, and what that may see; a row without a token keeps all.
        seen = places.gather(1, (count - 1).clamp(min=0).unsqueeze(1)).masked_fill(
            count.unsqueeze(1) == 0, length
        )
        back = torch.arange(length - 1, -1, -1, device=x.device)
        after = after.masked_fill((back > seen).unsqueeze(-1), 0)
    if order is not None:
        y = without_padding(torch.empty_like(y).scatter(1, over_channels(order, y), y), real)
    return y, after


def _within(padded: Tensor, kernel: Tensor, places: Tensor) -> Tensor:
    """`causal_conv`, with zeros in place of inputs further back than `places` [B, T] tells."""
    taps = kernel.squeeze(1).unbind(-1)
    T, last = places.shape[1], len(taps) - 1
    y = padded[:, last:] * taps[last]
    for j, tap in enumerate(taps[:-1]):
        seen = (places >= last - j).unsqueeze(-1)
        y = y + torch.where(seen, padded[:, j : j + T], 0) * tap
    return y
