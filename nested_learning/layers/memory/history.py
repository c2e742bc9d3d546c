"""The convolution's history where rows are packed: each row's last inputs stand right before its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.packing import RowLayout
from nested_learning.ops.rows import over_channels


def packed_history(
    paths: Tensor, layout: RowLayout, first: int, length: int, tail: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a segment of packed rows with what the convolution has to see before them.

    A row's tokens begin at a column of their own (`RowLayout.offset`), so the inputs of its earlier calls are
    put into the columns right before that, which hold no token.

    Args:
        paths: [B, C, channels] the inputs of the segment.
        first: its first column in the layout.
        length: K − 1.
        tail: [B, K−1, channels] the last inputs of each row before the call, or found so far in it; None at
            the start of the sequence.
        history: [B, K−1, channels] the columns before the segment; None for the first segment.

    Returns: the inputs, with the tails of earlier calls in place, the K−1 columns before them, the last K−1
        inputs of each row's tokens so far, and the columns before the next segment.
    """
    # column c of paths is column length + c of padded
    padded = F.pad(paths, (0, 0, length, 0)) if history is None else torch.cat([history, paths], dim=1)
    columns = torch.arange(length, device=paths.device).unsqueeze(0)
    if tail is not None and history is None:
        before = over_channels(columns + layout.offset.unsqueeze(1), paths)  # empty so far
        padded = padded.scatter_add(1, before, tail.to(paths.dtype))
    end = layout.end - first  # first column after the row's tokens, which may lie outside of the segment
    found = padded.gather(1, over_channels(columns + end.clamp(0, paths.shape[1]).unsqueeze(1), paths))
    if history is not None:
        assert tail is not None  # found in the first segment, if nothing else
        found = torch.where((end > 0)[:, None, None], found, tail)
    # A copy, as a view would keep the inputs of the whole segment.
    after = padded[:, padded.shape[1] - length :].clone()
    return padded[:, length:], padded[:, :length], found, after
