"""Softmax attention with rotary positions as a mixer: the memory that keeps every token (eq 62-63)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.registry import register_mixer
from nested_learning.layers.token_inputs import check_sequence
from nested_learning.memory.state import State


@dataclass(frozen=True)
class AttentionState(State):
    """Keys and values of the tokens so far.

    key, value: [B, H_kv, S, d], keys after rotation; positions: [B, S] int64, counting each row's real tokens
    from 0, −1 where the column holds padding.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x [B, H, T, d] at positions [B or 1, T].

    Pairs dimension i with i + d/2, rotated by position · theta^(−2i/d). Computed in float32 at least; the
    frequencies are no buffer, so nothing has to survive a load from a checkpoint.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = positions[:, None, :, None].to(dtype) * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@register_mixer("attention")
class Attention(nn.Module):
    """Causal multi-head attention: rotary positions, query-key norm, grouped queries, key-value state.

    Positions count the real tokens of each row, so padding on either side changes no other token.

    Args:
        hidden_size: width D of input and output.
        num_heads: number H of query heads; the head width d = D / H must be even.
        num_kv_heads: number of key and value heads, each shared by H / num_kv_heads query heads (default H).
        rope_theta: base of the rotary frequencies.
        qk_norm: RMS-normalise queries and keys per head, with learned scales.
        norm_eps: epsilon of that norm.

    Raises:
        ValueError: for sizes that do not divide.
    """

    has_surprise: ClassVar[bool] = False
    window: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(
                f"attention needs an even head width hidden_size / num_heads, got {hidden_size} / {num_heads}"
            )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
        if not rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        self.hidden_size, self.head_dim = hidden_size, hidden_size // num_heads
        self.num_kv_heads = num_kv_heads
        self.grouped = num_kv_heads != num_heads
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def forward(
        self, x: Tensor, state: AttentionState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend from x [B, T, D] to itself and to the tokens in `state`.

        Args:
            x: [B, T, D].
            state: of the tokens before, None at the start. One of another dtype (a session saved by the
                model in another precision) is converted to that of the new keys and values.
            mask: [B, T] bool, True for real tokens; None if all are.

        Returns:
            y [B, T, D], zero at padded positions, and the state with the new tokens in it.

        Raises:
            ValueError: when x, mask or state do not fit.
        """
        self._check(x, state, mask)
        positions = self._positions(x, state, mask)
        query, key, value = self._project(x, positions)
        if state is not None:
            key = torch.cat([state.key.to(key.dtype), key], dim=2)
            value = torch.cat([state.value.to(value.dtype), value], dim=2)
            key_positions = torch.cat([state.positions, positions], dim=1)
        else:
            key_positions = positions

        # Only a whole, unpadded sequence has the plain triangle, for which there are faster kernels.
        triangle = state is None and mask is None and (self.window is None or x.shape[1] <= self.window)
        y = self._attend(query, key, value, None if triangle else self._allowed(positions, key_positions))
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        return y, self._remember(AttentionState(key, value, key_positions), padded=mask is not None)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """[B, H, T, d]; `allowed` [B, T, S] bool, None for the plain causal triangle."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if allowed is None else allowed[:, None],
            is_causal=allowed is None,
            enable_gqa=self.grouped,
        )

    def _check(self, x: Tensor, state: AttentionState | None, mask: Tensor | None) -> None:
        check_sequence(x, self.hidden_size, mask, self.q_proj.weight)
        if state is None:
            return
        if not isinstance(state, AttentionState):
            raise ValueError(f"state must be an AttentionState, got {type(state).__name__}")
        length = state.key.shape[2] if state.key.dim() == 4 else -1
        expected = (x.shape[0], self.num_kv_heads, length, self.head_dim)
        got = tuple(state.key.shape), tuple(state.value.shape), tuple(state.positions.shape)
        if got != (expected, expected, (x.shape[0], length)):
            raise ValueError(
                f"state has key, value and positions of shapes {got}; this layer and input need "
                f"[{x.shape[0]}, {self.num_kv_heads}, S, {self.head_dim}] twice and [{x.shape[0]}, S]"
            )

    def _positions(self, x: Tensor, state: AttentionState | None, mask: Tensor | None) -> Tensor:
        """Position [B, T] of each token among its row's real tokens, −1 for padding."""
        batch_size, length, _ = x.shape
        if mask is None:
            positions = torch.arange(length, device=x.device).expand(batch_size, length)
        else:
            positions = mask.long().cumsum(dim=1) - 1
        if state is not None:
            positions = positions + state.positions.amax(dim=1, keepdim=True) + 1
        return positions if mask is None else positions.masked_fill(~mask, -1)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d] and keys [B, H_kv, T, d], values [B, H_kv, T, d], all of one dtype."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the projections are bfloat16 but the scales float32: normalise in float32.
            query = self.q_norm(query.to(self.q_norm.weight.dtype))
            key = self.k_norm(key.to(self.k_norm.weight.dtype))
        query = rotate(query, positions, self.rope_theta)
        key = rotate(key, positions, self.rope_theta)
        return query.to(value.dtype), key.to(value.dtype), value

    def _allowed(self, positions: Tensor, key_positions: Tensor) -> Tensor:
        """Which keys each query may see, [B, T, S] bool."""
        query, key = positions[:, :, None], key_positions[:, None, :]
        allowed = (key >= 0) & (key <= query)
        if self.window is not None:
            allowed &= key > query - self.window
        # A row without any key would be a softmax over nothing: NaN. What padding reads does not matter.
        return allowed | (query < 0)

    def _remember(self, state: AttentionState, padded: bool) -> AttentionState:
        """What of the state later tokens can still see: with a window, only its last real tokens."""
        if self.window is None:
            return state
        keep = max(self.window - 1, 1)  # one at least: it carries the position
        key, value, positions = state.key, state.value, state.positions
        if padded:
            # Move padding to the front, so that the cut below never drops a real token for it; a state
            # without later padding stays in this order.
            order = positions.argsort(dim=1, stable=True)
            index = order[:, None, :, None].expand_as(key)
            key, value = key.gather(2, index), value.gather(2, index)
            positions = positions.gather(1, order)
        return AttentionState(key[:, :, -keep:], value[:, :, -keep:], positions[:, -keep:])


@register_mixer("sliding_window_attention")
class SlidingWindowAttention(Attention):
    """Attention of each token to itself and the `window` − 1 real tokens before it; its state is bounded.

    Args:
        window: number of tokens seen, at least 1. The others are those of `Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, rope_theta, qk_norm, norm_eps)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window must be a positive number of tokens, got {window!r}")
        self.window = window
