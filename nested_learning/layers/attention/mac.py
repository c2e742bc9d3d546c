"""Titans MAC (arXiv 2501.00663, §4.1): what the memory recalls is context for attention within a segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.attention.mag_mal import build_memory
from nested_learning.layers.attention.softmax import rotate
from nested_learning.layers.registry import register_mixer
from nested_learning.layers.token_inputs import check_count, check_sequence
from nested_learning.memory.scan import MemoryState
from nested_learning.memory.state import State
from nested_learning.ops.norm import unit
from nested_learning.ops.packing import row_layout


@dataclass(frozen=True)
class ContextState(State):
    """The memory, and the keys and values of the tokens of the running segment.

    key, value: [B, 2, H, C, d], for what was recalled and for the tokens themselves; columns from the row's
    position on are empty.  position: [B] int64, real tokens modulo C.
    """

    memory: MemoryState
    key: Tensor
    value: Tensor
    position: Tensor


@register_mixer("mac")
class MemoryAsContext(nn.Module):
    """Titans MAC. Tokens come in segments S of C: h = M(S W_q) is recalled from the memory as it stood at the
    end of the segment before, attention runs causally over [p; h; S], its output y updates the memory, and
    the layer gives W_o (RMSnorm(y) ⊙ SiLU(RMSnorm(M(y)))).

    Token t of a segment sees h_s of s ≤ t only **(ours: h_s is a function of token s, so a later one would
    tell the future)**. M(y) is read token by token where the memory is.

    Args:
        hidden_size: D, the width of the input.
        num_heads: heads of memory and attention; the head width must be even.
        segment: tokens C of a segment; also the memory's chunk length.
        persistent_tokens: number of learned tokens p in front of every segment.
        memory: name of the memory layer, a row of the table with a chunk length of its own.
        memory_options: its options, without chunk_size.
        rope_theta: base of the rotary frequencies; h_s stands at the position of token s.

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
        rope_theta: float = 10_000.0,
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
        if (hidden_size // num_heads) % 2:
            raise ValueError(f"attention needs an even head width, got {hidden_size} / {num_heads}")
        if not rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        check_count("persistent_tokens", persistent_tokens, least=0)
        self.hidden_size, self.num_heads, self.segment = hidden_size, num_heads, segment
        self.head_dim, self.rope_theta = hidden_size // num_heads, rope_theta
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, hidden_size))
        self.recall_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.recall_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.memory_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what has a rule of its own; plain projections are left alone."""
        self.memory.reset_parameters()
        nn.init.normal_(self.persistent)

    def forward(
        self,
        x: Tensor,
        state: ContextState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
    ) -> tuple[Tensor, ContextState] | tuple[Tensor, ContextState, Tensor]:
        """x [B, T, D] to y [B, T, D]; arguments, results and errors as in `MemoryLayer.forward`."""
        self._check(x, state, mask)
        B, T, _ = x.shape
        position = x.new_zeros(B, dtype=torch.long) if state is None else state.position
        if T == 1:  # one token for each row, wherever its row stands inside its segment
            real = x.new_ones(B, 1, dtype=torch.bool) if mask is None else mask
            y, state, surprise = self._segment(x, real, position.unsqueeze(1), state)
            y, surprise = y * real.unsqueeze(-1), surprise * real
        else:
            whole = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            before = 0 if state is None else self.segment - 1
            columns = -(-(before + T) // self.segment) * self.segment
            layout = row_layout(whole, position, columns)
            outputs, surprises = [], []
            packed, filled = layout.pack(x), layout.filled
            for piece, here in zip(packed.split(self.segment, 1), filled.split(self.segment, 1), strict=True):
                column = torch.arange(self.segment, device=x.device).expand(B, -1)
                y, state, surprise = self._segment(piece, here, column, state)
                outputs.append(y)
                surprises.append(surprise)
            y = layout.unpack(torch.cat(outputs, dim=1))
            surprise = layout.unpack(torch.cat(surprises, dim=1))
        assert state is not None
        return (y, state, surprise) if return_surprise else (y, state)

    def _segment(
        self, x: Tensor, filled: Tensor, column: Tensor, state: ContextState | None
    ) -> tuple[Tensor, ContextState, Tensor]:
        """Tokens x [B, S, D] of one segment at the columns [B, S] of it, where `filled` [B, S]."""
        S = x.shape[1]
        memory = None if state is None else state.memory
        query, key, value = self._project(x, self._recall(x, memory), column)
        if state is not None and S == 1:
            at = column[:, None, None, :, None].expand_as(key)
            write = filled[:, None, None, :, None]
            key = _put(state.key.to(key.dtype), at, key, write)
            value = _put(state.value.to(value.dtype), at, value, write)
        elif state is not None:
            old = (~filled & (column < state.position.unsqueeze(1)))[:, None, None, :, None]
            key = torch.where(old, state.key.to(key.dtype), key)
            value = torch.where(old, state.value.to(value.dtype), value)
        elif S == 1:
            at = column[:, None, None, :, None].expand_as(key)
            empty = key.new_zeros(*key.shape[:3], self.segment, key.shape[-1])
            key, value = empty.scatter(3, at, key), empty.scatter(3, at, value)
        y = self.attention_out(self._attend(query, key, value, column).transpose(1, 2).flatten(2))
        remembered, memory, surprise = self.memory(y, memory, filled, return_surprise=True)
        gate = self.memory_norm(remembered.to(self.memory_norm.weight.dtype)).to(y.dtype)
        attended = self.attention_norm(y.to(self.attention_norm.weight.dtype)).to(y.dtype)
        position = memory.position % self.segment
        # columns from the position on are empty, whatever stood there in the segment before
        live = (torch.arange(self.segment, device=x.device) < position.unsqueeze(1))[:, None, None, :, None]
        new = ContextState(memory, key * live, value * live, position)
        return self.out_proj(attended * F.silu(gate)), new, surprise

    def _recall(self, x: Tensor, state: MemoryState | None) -> Tensor:
        """h = M(x W_q) [B, S, D] at the end of the last segment."""
        q = F.silu(self.recall_proj(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = unit(q.to(torch.promote_types(q.dtype, torch.float32)))
        h = F.rms_norm(self.memory.recall(q, state), (self.head_dim,))
        return self.recall_out(h.to(x.dtype).transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, h: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens [B, H, S, d]; keys and values [B, 2, H, S, d] of h and the tokens."""
        qkv = self.qkv_proj(torch.stack([h, x], dim=1))  # [B, 2, S, 3D]
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        query = rotate(self._norm(self.q_norm, query[:, 1]), column, self.rope_theta)
        keys = rotate(self._norm(self.k_norm, key).flatten(1, 2), column, self.rope_theta)
        return query.to(value.dtype), keys.unflatten(1, (2, -1)).to(value.dtype), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, column: Tensor) -> Tensor:
        """Causally over [p; h; S] within the segment: [B, H, S, d]."""
        B, P, C = query.shape[0], len(self.persistent), key.shape[3]
        p = self.qkv_proj(self.persistent.to(self.qkv_proj.weight.dtype))
        _, p_key, p_value = p.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(1, 2, 0, 3)
        p_key = self._norm(self.k_norm, p_key)  # [H, P, d]
        keys = [p_key.to(key.dtype).expand(B, -1, -1, -1), key[:, 0], key[:, 1]]
        values = [p_value.to(value.dtype).expand(B, -1, -1, -1), value[:, 0], value[:, 1]]
        causal = torch.arange(C, device=column.device) <= column.unsqueeze(-1)  # [B, S, C]
        allowed = torch.cat([causal.new_ones(B, column.shape[1], P), causal, causal], dim=-1)
        return F.scaled_dot_product_attention(
            query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=allowed.unsqueeze(1)
        )

    @staticmethod
    def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """Under autocast projections are bfloat16 but scales float32: normalise in float32."""
        return norm(x.to(norm.weight.dtype))

    def _check(self, x: Tensor, state: ContextState | None, mask: Tensor | None) -> None:
        check_sequence(x, self.hidden_size, mask, self.qkv_proj.weight)
        if state is None:
            return
        if not isinstance(state, ContextState):
            raise ValueError(
                f"state must be a ContextState, got {type(state).__name__}: it is another layer's"
            )
        expected = (x.shape[0], 2, self.num_heads, self.segment, self.head_dim)
        if tuple(state.key.shape) != expected:
            raise ValueError(
                f"state has keys of shape {tuple(state.key.shape)}, this layer and input need {expected}"
            )


def _put(into: Tensor, at: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """`into` [B, 2, H, C, d] with `value` [B, 2, H, 1, d] at the columns `at`, for rows marked in `where`."""
    return into.scatter(3, at, torch.where(where, value, into.gather(3, at)))
