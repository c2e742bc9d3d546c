"""Working through a sequence in blocks that stay in a cache, where the passes over memory are what costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of one block and thread: a few tensors of this size stay in a core's caches.
BLOCK = 131_072


def traced() -> bool:
    """Whether Python code is followed symbolically, by torch.compile or torch.func, which then sees more in
    plain operations than in what is arranged for speed."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def composes(x: Tensor) -> bool:
    """Whether plain operations on all of x are better: no CPU, little to do, or a tracing transform."""
    return x.device.type != "cpu" or x.numel() < BLOCK or traced()


def blocks(x: Tensor, tokens: int) -> Iterator[tuple[int, slice]]:
    """Rows of x [B, ..., channels] and columns among `tokens`, block by block."""
    size = max(1, BLOCK * torch.get_num_threads() // x.shape[-1])
    for row in range(len(x)):
        for start in range(0, tokens, size):
            yield row, slice(start, min(start + size, tokens))
