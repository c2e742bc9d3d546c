"""Titans MAC (arXiv 2501.00663, §4.1): what the memory recalls is context for attention within a segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.attention.heads import check_rotary, normed, rotate
from nested_learning.layers.attention.mag_mal import build_memory
from nested_learning.layers.effective import input_dtype, refuse_change_per_row
from nested_learning.layers.registry import register_mixer
from nested_learning.layers.token_inputs import (
    RMSNorm,
    check_count,
    check_sequence,
    check_state,
    find_documents,
    without_padding,
)
from nested_learning.memory.running import MemoryState
from nested_learning.memory.state import State
from nested_learning.ops.context import attention_kernels
from nested_learning.ops.documents import Documents
from nested_learning.ops.norm import unit
from nested_learning.ops.packing import row_layout


@dataclass(frozen=True)
class ContextState(State):
    """The memory, and keys and values of the tokens so far of each row's running segment.

    Attributes:
        memory: state of the memory, whose chunks are the segments.
        key, value: [B, 2, H, C, d], of what was recalled and of the tokens themselves; zero in the columns
            that hold no token yet, those from `position` on.
        position: [B] int64, number of real tokens in the running segment, below C.
    """

    memory: MemoryState
    key: Tensor
    value: Tensor
    position: Tensor


@register_mixer("mac")
class MemoryAsContext(nn.Module):
    """Titans MAC: attention within a segment, to its tokens and to what the memory recalls for them.

    A segment S, here and in that paper, is C successive tokens of a row. h = M(S W_q) is recalled from the
    memory as it stood at the end of the segment before, attention runs causally over [p; h; S], its output y
    at the tokens of S updates the memory, and the layer gives W_o (RMSnorm(y) ⊙ SiLU(RMSnorm(M(y)))).

    Token t of a segment sees h_s of s ≤ t only **(ours: h_s is a function of token s, so a later one would
    tell the future)**. M(y) is read as the memory layer reads, token by token in 'titans', where the paper
    has the memory after the whole segment **(ours, for the same reason)**.

    Args:
        hidden_size: width D of input and output.
        num_heads: number H of heads of memory and attention; the head width d = D / H must be even where it
            is rotated.
        segment: number C of tokens in a segment; also the memory's chunk length.
        persistent_tokens: number of learned tokens p in front of every segment.
        memory: name of the memory layer, a row of the table with a chunk length of its own.
        memory_options: options of the memory layer, without chunk_size.
        rope_theta: base of the rotary frequencies; h_s stands at the position of token s, p at none. None
            for no positions at all.

    Raises:
        ValueError: for options that do not fit.
    """

    has_surprise: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        segment: int = 64,
        persistent_tokens: int = 4,
        memory: str = "titans",
        memory_options: Mapping[str, Any] | None = None,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        options = dict(memory_options or {})
        if "chunk_size" in options:
            raise ValueError(
                f"memory_options has chunk_size={options['chunk_size']!r}, but the memory's chunk is the "
                "segment; set segment instead"
            )
        self.memory = build_memory(memory, hidden_size, num_heads, {**options, "chunk_size": segment})
        if self.memory.system.exact or set(self.memory.system.chunk_sizes) != {segment}:
            raise ValueError(
                f"MAC recalls from the end of the last segment, so all memories of memory={memory!r} must "
                f"have anchors every {segment} tokens; use 'titans', 'self_modifying_titans' or another row "
                "whose gradients are taken per chunk"
            )
        check_rotary(hidden_size, num_heads, rope_theta)
        check_count("persistent_tokens", persistent_tokens, least=0)
        self.hidden_size, self.num_heads, self.segment = hidden_size, num_heads, segment
        self.head_dim, self.rope_theta = hidden_size // num_heads, rope_theta
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, hidden_size))
        self.recall_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.recall_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = RMSNorm(self.head_dim, eps=1e-6)
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_norm = RMSNorm(hidden_size, eps=1e-6)
        self.memory_norm = RMSNorm(hidden_size, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise memory and persistent tokens; plain projections and norms are left alone."""
        self.memory.reset_parameters()
        nn.init.normal_(self.persistent)

    def part_names(self) -> dict[str, str]:
        """Handles of the parts besides the memory's own; see `nested_learning.parts`."""
        attention = ("qkv_proj", "q_norm", "k_norm", "attention_out", "attention_norm", "out_proj")
        recall = ("recall_proj", "recall_out", "memory_norm")
        return {
            **dict.fromkeys(attention, "attention"),
            **dict.fromkeys(recall, "recall"),
            "persistent": "persistent",
        }

    def forward(
        self,
        x: Tensor,
        state: ContextState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, ContextState | None] | tuple[Tensor, ContextState | None, Tensor]:
        """x [B, T, D] to y [B, T, D]; arguments, results and errors as in `MemoryLayer.forward`."""
        self._check(x, state, mask)
        packed = find_documents(x, mask, state is not None, documents, position_ids)
        if packed is None:
            (y, surprise), state = self._read(x, state, mask, state is None)
        else:
            (y, surprise), state = packed.read(self._read, x, state, self.segment)
        return (y, state, surprise) if return_surprise else (y, state)

    def _read(
        self, x: Tensor, state: ContextState | None, mask: Tensor | None, aligned: bool
    ) -> tuple[tuple[Tensor, Tensor], ContextState]:
        """y [B, T, D] and the surprise [B, T], and the state; `aligned`: all rows begin a segment."""
        position = x.new_zeros(len(x), dtype=torch.long) if state is None else state.position
        if x.shape[1] == 1:  # one token of each row, wherever the row stands inside its segment
            x = without_padding(x, mask)
            y, state, surprise = self._read_segment(x, state, mask, position.unsqueeze(1))
            return (without_padding(y, mask), surprise), state
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        y, state, surprise = self._read_sequence(x, state, real, position, aligned)
        return (y, surprise), state

    def _read_sequence(
        self, x: Tensor, state: ContextState | None, real: Tensor, position: Tensor, aligned: bool
    ) -> tuple[Tensor, ContextState, Tensor]:
        """Segment after segment, in a layout in which all rows begin one at the same column."""
        B, T, _ = x.shape
        before = 0 if aligned else self.segment - 1  # most that a row's running segment holds already
        columns = -(-(before + T) // self.segment) * self.segment
        layout = row_layout(real, position, columns)
        column = torch.arange(self.segment, device=x.device).expand(B, -1)
        outputs, surprises = [], []
        parts = (packed.split(self.segment, dim=1) for packed in (layout.pack(x), layout.real))
        for tokens, filled in zip(*parts, strict=True):
            y, state, surprise = self._read_segment(tokens, state, filled, column)
            outputs.append(y)
            surprises.append(surprise)
        assert state is not None  # there is a segment, as T ≥ 1
        return layout.unpack(torch.cat(outputs, 1)), state, layout.unpack(torch.cat(surprises, 1))

    def _read_segment(
        self, x: Tensor, state: ContextState | None, real: Tensor | None, column: Tensor
    ) -> tuple[Tensor, ContextState, Tensor]:
        """Tokens x [B, S, D] at the columns [B, S] of the running segment: all C of them, or one."""
        memory = None if state is None else state.memory
        query, key, value = self._project(x, self._recall(x, memory), column)
        every = torch.arange(self.segment, device=x.device)  # column of the segment
        here = every == column
        key, value = self._insert(state, key, value, here if real is None else real & here)
        y = self.attention_out(self._attend(query, key, value, column).transpose(1, 2).flatten(2))
        remembered, memory, surprise = self.memory(y, memory, real, return_surprise=True)
        gate = normed(self.memory_norm, remembered).to(y.dtype)
        attended = normed(self.attention_norm, y).to(y.dtype)
        position = memory.position % self.segment
        # A segment that is complete leaves nothing behind: its position is 0.
        kept = (every < position.unsqueeze(1))[:, None, None, :, None]
        state = ContextState(memory, key * kept, value * kept, position)
        return self.out_proj(attended * F.silu(gate)), state, surprise

    def _insert(
        self, state: ContextState | None, key: Tensor, value: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, 2, H, C, d] of the running segment: the state's, and at `here` [B, C] new ones.

        The new ones [B, 2, H, S, d] belong to all C columns, or, with S = 1, to the one marked in each row.
        """
        here = here[:, None, None, :, None]
        if state is None:
            return torch.where(here, key, 0), torch.where(here, value, 0)
        return (
            torch.where(here, key, state.key.to(key.dtype)),
            torch.where(here, value, state.value.to(value.dtype)),
        )

    def _recall(self, x: Tensor, state: MemoryState | None) -> Tensor:
        """h = M(x W_q) [B, S, D] at the end of the last segment, per head normalised, then projected."""
        q = F.silu(self.recall_proj(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = unit(q.to(torch.promote_types(q.dtype, torch.float32)))
        h = F.rms_norm(self.memory.recall(q, state), (self.head_dim,))
        return self.recall_out(h.to(x.dtype).transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, h: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens [B, H, S, d]; keys and values [B, 2, H, S, d] of h and the tokens."""
        qkv = self.qkv_proj(torch.stack([h, x], dim=1))  # [B, 2, S, 3D]
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        query = rotate(normed(self.q_norm, query[:, 1]), column, self.rope_theta)
        keys = rotate(normed(self.k_norm, key).flatten(1, 2), column, self.rope_theta)
        return query.to(value.dtype), keys.unflatten(1, (2, -1)).to(value.dtype), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, column: Tensor) -> Tensor:
        """Causal attention over [p; h; S] within the segment, [B, H, S, d]."""
        B, P, C = len(query), len(self.persistent), self.segment
        refuse_change_per_row(self.qkv_proj)
        p = self.qkv_proj(self.persistent.to(input_dtype(self.qkv_proj)))
        _, p_key, p_value = p.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(1, 2, 0, 3)
        p_key = normed(self.k_norm, p_key).to(key.dtype)  # [H, P, d]
        keys = torch.cat([p_key.expand(B, -1, -1, -1), *key.unbind(1)], dim=2)
        values = torch.cat([p_value.to(value.dtype).expand(B, -1, -1, -1), *value.unbind(1)], dim=2)
        causal = torch.arange(C, device=column.device) <= column.unsqueeze(-1)  # [B, S, C]
        allowed = F.pad(causal.repeat(1, 1, 2), (P, 0), value=True)
        with attention_kernels():
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed.unsqueeze(1))

    def _check(self, x: Tensor, state: ContextState | None, mask: Tensor | None) -> None:
        check_sequence(x, self.hidden_size, mask, self.qkv_proj)
        if state is not None:
            shape = len(x), 2, self.num_heads, self.segment, self.head_dim
            check_state(state, ContextState, x, {"key": shape, "value": shape, "position": (len(x),)})
