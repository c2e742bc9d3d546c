"""Titans in a model (arXiv 2501.00663, §4): the memory as a gate (MAG) and as a layer (MAL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.attention.persistent import PersistentWindowAttention
from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.registry import build_mixer, register_mixer
from nested_learning.memory.scan import MemoryState
from nested_learning.memory.state import State


@dataclass(frozen=True)
class MemoryAttentionState(State):
    """The states of the two branches."""

    memory: MemoryState
    attention: AttentionState


def build_memory(
    name: str, hidden_size: int, num_heads: int, options: Mapping[str, Any] | None
) -> MemoryLayer:
    """The memory layer `name` of the table.

    Raises:
        ValueError: for an unknown name or option, or a mixer that is not a memory.
    """
    layer = build_mixer(name, hidden_size, num_heads, dict(options or {}))
    if not isinstance(layer, MemoryLayer):
        raise ValueError(f"memory={name!r} is not a memory layer; use a row of the table, such as 'titans'")
    return layer


class _MemoryAndAttention(nn.Module):
    """A memory layer and sliding-window attention, both behind learned persistent tokens.

    The memory reads the persistent tokens at the start of a sequence; for attention they are keys and values
    that never leave the window.
    """

    has_surprise: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int = 64,
        persistent_tokens: int = 4,
        memory: str = "titans",
        memory_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.memory = build_memory(memory, hidden_size, num_heads, memory_options)
        self.attention = PersistentWindowAttention(hidden_size, num_heads, window, persistent_tokens)
        self.memory_norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def reset_parameters(self) -> None:
        """Initialise what has a rule of its own; plain projections are left alone."""
        self.memory.reset_parameters()
        self.attention.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: MemoryAttentionState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
    ) -> tuple[Tensor, MemoryAttentionState] | tuple[Tensor, MemoryAttentionState, Tensor]:
        """x [B, T, D] to y [B, T, D]; arguments, results and errors as in `MemoryLayer.forward`."""
        if state is not None and not isinstance(state, MemoryAttentionState):
            raise ValueError(
                f"state must be a MemoryAttentionState, got {type(state).__name__}: it is another layer's"
            )
        remembered, memory_state, surprise = self._remember(x, None if state is None else state.memory, mask)
        remembered = self.memory_norm(remembered.to(self.memory_norm.weight.dtype)).to(remembered.dtype)
        y, attention_state = self._combine(x, remembered, None if state is None else state.attention, mask)
        new = MemoryAttentionState(memory_state, attention_state)
        return (y, new, surprise) if return_surprise else (y, new)

    def _remember(
        self, x: Tensor, state: MemoryState | None, mask: Tensor | None
    ) -> tuple[Tensor, MemoryState, Tensor]:
        """M([p; x]) without its first outputs, and the surprise [B, T]."""
        P = len(self.attention.persistent) if state is None else 0
        if P and x.dim() == 3:  # the memory layer itself refuses other shapes
            front = self.attention.persistent.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([front, x], dim=1)
            mask = None if mask is None else F.pad(mask, (P, 0), value=True)
        y, state, surprise = self.memory(x, state, mask, return_surprise=True)
        return y[:, P:], state, surprise[:, P:]

    def _combine(
        self, x: Tensor, remembered: Tensor, state: AttentionState | None, mask: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        raise NotImplementedError


@register_mixer("mag")
class MemoryAsGate(_MemoryAndAttention):
    """Titans MAG: attention over the window and the memory in parallel, one gating the other.

    y = W_o (RMSnorm(SWA([p; x])) ⊙ SiLU(RMSnorm(M([p; x])))), both norms with learned scales; the paper
    leaves the non-linearity open, and SiLU on the memory's branch is ours.

    Args: as in `MemoryAsLayer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int = 64,
        persistent_tokens: int = 4,
        memory: str = "titans",
        memory_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, window, persistent_tokens, memory, memory_options)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _combine(
        self, x: Tensor, remembered: Tensor, state: AttentionState | None, mask: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        attended, state = self.attention(x, state, mask)
        attended = self.attention_norm(attended.to(self.attention_norm.weight.dtype)).to(attended.dtype)
        return self.out_proj(attended * F.silu(remembered)), state


@register_mixer("mal")
class MemoryAsLayer(_MemoryAndAttention):
    """Titans MAL: the memory compresses [p; x], attention over the window reads what it gives.

    y = SWA(RMSnorm(M([p; x]))), the norm with learned scales (ours).

    Args:
        hidden_size: D, the width of the input.
        num_heads: heads of memory and attention.
        window: tokens that attention sees, itself included.
        persistent_tokens: number of learned tokens p in front.
        memory: name of the memory layer, a row of the table.
        memory_options: its options.

    Raises:
        ValueError: for options that do not fit, as in the two layers.
    """

    def _combine(
        self, x: Tensor, remembered: Tensor, state: AttentionState | None, mask: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        return self.attention(remembered, state, mask)
