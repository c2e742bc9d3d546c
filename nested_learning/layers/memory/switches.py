"""Switches of the memory layers inside a module: what changes their cost, and no result beyond rounding."""

from __future__ import annotations

from torch import nn

from nested_learning.layers.memory.layer import MemoryLayer


def set_recompute(module: nn.Module, how: str | None) -> int:
    """Choose what the backward pass through a module's memory layers recomputes; returns their number.

    Args:
        how: None keeps all that it needs; "chunk" keeps the input and the memories' weights before every
            √n-th of n chunks and computes the rest again: less memory for about a third more time. No
            result changes.

    Raises:
        ValueError: for another value of `how`.
    """
    if how not in (None, "chunk"):
        raise ValueError(f"recompute must be None or 'chunk', got {how!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, MemoryLayer)]
    for layer in layers:
        layer.recompute = how
    return len(layers)


def set_compile_step(module: nn.Module, compiled: bool) -> int:
    """Choose whether a module's memory layers run a chunk through torch.compile; returns their number.

    No result changes beyond rounding. One graph, with gradients one forward and one backward, serves every
    chunk, every length of a sequence and every layer of the same kind. Another precision makes another, and
    so do the first four batch sizes: with other ones, as documents in a row bring them, chunks run plainly.
    So do less than a chunk of tokens and, for Titans and self-modifying Titans, second derivatives. Without
    a working compiler there is one warning, and all runs plainly. See docs/log.md for what it gains and what
    compiling costs.

    Raises:
        ValueError: when `compiled` is not True or False.
    """
    if not isinstance(compiled, bool):
        raise ValueError(f"compile_step must be True or False, got {compiled!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, MemoryLayer)]
    for layer in layers:
        layer.compile_step = compiled
    return len(layers)
