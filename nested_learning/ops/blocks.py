"""Working through a sequence in blocks that stay in a cache, where the passes over memory are what costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of one block and thread: a few tensors of this size stay in a core's caches.
BLOCK = 131_072


def composes(x: Tensor) -> bool:
    """Whether plain operations on all of x are better: no CPU, little to do, or a tracing transform."""
    return (
        x.device.type != "cpu"
        or x.numel() < BLOCK
        # what follows a Python function symbolically sees more in plain operations
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def blocks(x: Tensor, tokens: int) -> Iterator[tuple[int, slice]]:
    """Rows of x [B, ..., channels] and columns among `tokens`, block by block."""
    size = max(1, BLOCK * torch.get_num_threads() // x.shape[-1])
    for row in range(len(x)):
        for start in range(0, tokens, size):
            yield row, slice(start, min(start + size, tokens))
