"""Titans in a model (arXiv 2501.00663, §4): the memory as a gate (MAG, §4.2) and as a layer (MAL, §4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.attention.heads import normed
from nested_learning.layers.attention.persistent import PersistentWindowAttention
from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.layers.effective import held_parameter
from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.registry import build_mixer, register_mixer
from nested_learning.layers.token_inputs import RMSNorm, check_sequence, check_state, find_documents
from nested_learning.memory.running import MemoryState
from nested_learning.memory.state import State
from nested_learning.ops.documents import Documents


@dataclass(frozen=True)
class MemoryAttentionState(State):
    """States of the memory, which has read the persistent tokens first, and of the attention."""

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
    """A memory M and sliding-window attention SWA, both behind learned persistent tokens p.

    The memory reads p at the start of a sequence or document; for attention they are keys and values that
    never leave the window. A subclass says how the two are joined.

    Args: as in `MemoryAsLayer`.
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
        rope_theta: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        self.memory = build_memory(memory, hidden_size, num_heads, memory_options)
        self.attention = PersistentWindowAttention(
            hidden_size, num_heads, window, persistent_tokens, rope_theta
        )
        self.memory_norm = RMSNorm(hidden_size, eps=1e-6)
        self._add_joint(hidden_size)

    def _add_joint(self, hidden_size: int) -> None:
        """Add the parameters of `_join`."""

    def reset_parameters(self) -> None:
        """Initialise memory and persistent tokens; plain projections and norms are left alone."""
        self.memory.reset_parameters()
        self.attention.reset_parameters()

    def part_names(self) -> dict[str, str]:
        """Handles of the parts besides the memory's own; see `nested_learning.parts`."""
        return {
            "memory_norm": "projections",
            "attention": "attention",
            "attention.persistent": "persistent",
            "attention_norm": "attention",
            "out_proj": "attention",
        }

    def forward(
        self,
        x: Tensor,
        state: MemoryAttentionState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, MemoryAttentionState | None] | tuple[Tensor, MemoryAttentionState | None, Tensor]:
        """x [B, T, D] to y [B, T, D]; arguments, results and errors as in `MemoryLayer.forward`."""
        if state is not None:
            check_state(state, MemoryAttentionState, x, {})
        memory, attention = (None, None) if state is None else (state.memory, state.attention)
        check_sequence(x, self.memory.hidden_size, mask, self.memory.in_proj)
        if memory is not None:
            self.memory.check_state(memory, x)
        real = mask
        packed = find_documents(x, real, state is not None, documents, position_ids)
        remembered, memory, surprise = self._remember(x, memory, real, packed)
        remembered = normed(self.memory_norm, remembered).to(remembered.dtype)
        y, attention = self._join(x, remembered, attention, real, packed)
        new = None if memory is None or attention is None else MemoryAttentionState(memory, attention)
        return (y, new, surprise) if return_surprise else (y, new)

    def steady(self, state: MemoryAttentionState) -> MemoryAttentionState:
        """See `Attention.steady`."""
        return MemoryAttentionState(state.memory, self.attention.steady(state.attention))

    def _remember(
        self, x: Tensor, state: MemoryState | None, real: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, MemoryState | None, Tensor]:
        """M([p; x]) at the tokens x [B, T, D], the state, and the surprise [B, T]."""
        p = held_parameter(self.attention, "persistent").to(x.dtype)
        if documents is not None:
            return self.memory.read_documents(x, state, documents, True, p)
        P = len(p) if state is None else 0
        if P:
            x = torch.cat([p.expand(len(x), -1, -1), x], dim=1)
            real = None if real is None else F.pad(real, (P, 0), value=True)
        y, state, surprise = self.memory(x, state, real, return_surprise=True)
        return y[:, P:], state, surprise[:, P:]

    def _join(
        self,
        x: Tensor,
        remembered: Tensor,
        state: AttentionState | None,
        real: Tensor | None,
        documents: Documents | None,
    ) -> tuple[Tensor, AttentionState | None]:
        """y [B, T, D] from the input and RMSnorm(M([p; x])), and the state of attention."""
        raise NotImplementedError


@register_mixer("mag")
class MemoryAsGate(_MemoryAndAttention):
    """Titans MAG: attention over the window and the memory in parallel, one gating the other.

    y = W_o (RMSnorm(SWA([p; x])) ⊙ SiLU(RMSnorm(M([p; x])))), both norms with learned scales. The paper
    leaves the non-linearity open; SiLU on the memory's branch and W_o are **(ours)**.

    Args: as in `MemoryAsLayer`.
    """

    def _add_joint(self, hidden_size: int) -> None:
        self.attention_norm = RMSNorm(hidden_size, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _join(
        self,
        x: Tensor,
        remembered: Tensor,
        state: AttentionState | None,
        real: Tensor | None,
        documents: Documents | None,
    ) -> tuple[Tensor, AttentionState | None]:
        attended, state = self.attention(x, state, real, documents)
        attended = normed(self.attention_norm, attended).to(attended.dtype)
        return self.out_proj(attended * F.silu(remembered)), state


@register_mixer("mal")
class MemoryAsLayer(_MemoryAndAttention):
    """Titans MAL: the memory compresses [p; x], attention over the window reads what it gives.

    y = SWA([p; RMSnorm(M([p; x]))]), of M's outputs those at x. The norm, with learned scales, is **(ours)**;
    so is that attention sees p itself, where the paper has M's outputs at p.

    Args:
        hidden_size: width D of input and output.
        num_heads: number of heads of memory and attention.
        window: number of tokens that attention sees, the token itself included.
        persistent_tokens: number of learned tokens p in front.
        memory: name of the memory layer, a row of the table.
        memory_options: options of the memory layer.
        rope_theta: base of the rotary frequencies of the attention; None for no positions.

    Raises:
        ValueError: for options that do not fit, as in the two layers.
    """

    def _join(
        self,
        x: Tensor,
        remembered: Tensor,
        state: AttentionState | None,
        real: Tensor | None,
        documents: Documents | None,
    ) -> tuple[Tensor, AttentionState | None]:
        return self.attention(remembered, state, real, documents)
