"""Softmax attention: a memory without parameters that keeps every token, or those of a window (eq 62-63)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning._checks import fits
from nested_learning.layers.attention.convolution import convolved, short_conv
from nested_learning.layers.attention.heads import check_rotary, normed, rotate
from nested_learning.layers.registry import register_mixer
from nested_learning.layers.token_inputs import (
    RMSNorm,
    check_count,
    check_sequence,
    find_documents,
    without_padding,
)
from nested_learning.memory.state import State
from nested_learning.ops.context import attention_kernels
from nested_learning.ops.documents import Documents
from nested_learning.ops.rows import padded


@dataclass(frozen=True)
class AttentionState(State):
    """Keys and values of the tokens so far.

    Attributes:
        key, value: [B, H_kv, S, d], keys after rotation, where there is one.
        positions: [B, S] int64, each token's place among its row's real tokens, from 0; −1 for padding.
        conv_tail: [B, K−1, D] the layer's last inputs, where it has a convolution.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    conv_tail: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """As in `State`, without the columns in front that are empty in every row."""
        tensors, columns = super().to_tensors(), {"key": 2, "value": 2, "positions": 1}
        if not self.positions.numel() or self.positions.device.type == "meta":
            return tensors
        held = (self.positions >= 0).any(0)
        held[-1] = True  # one column stays
        empty = int(held.int().argmax())
        for name, dim in columns.items():
            tensors[name] = tensors[name].narrow(dim, empty, tensors[name].shape[dim] - empty)
        return tensors

    def tokens_last(self) -> AttentionState:
        """The state with each row's padding in front of its tokens."""
        order = self.positions.argsort(dim=1, stable=True)
        index = order[:, None, :, None].expand_as(self.key)
        key, value = self.key.gather(2, index), self.value.gather(2, index)
        return replace(self, key=key, value=value, positions=self.positions.gather(1, order))

    def last_columns(self, columns: int) -> AttentionState:
        """The last columns of the state alone."""
        key, value = self.key[:, :, -columns:], self.value[:, :, -columns:]
        return replace(self, key=key, value=value, positions=self.positions[:, -columns:])


@register_mixer("attention")
class Attention(nn.Module):
    """Causal multi-head attention: rotary or no positions, query-key norm, grouped queries, key-value state.

    In each head, y_t = Σ_{s ≤ t} softmax_s(⟨k_s, q_t⟩ / √d) v_s: the vector with the least squared error to
    the values so far, weighted by exp(⟨k_s, q_t⟩ / √d) (Nadaraya-Watson; arXiv 2512.24695, eq 62).

    Positions count the real tokens of each row, so padding on either side changes no other token.

    Args:
        hidden_size: width D of input and output.
        num_heads: number H of query heads; the head width d = D / H must be even where it is rotated.
        num_kv_heads: number H_kv of key and value heads, each shared by H / H_kv query heads (default H).
        rope_theta: base of the rotary frequencies; None for no positions at all: what is seen is a set, and
            only its causal growth tells the order (as in the literature on formal languages).
        qk_norm: RMS-normalise queries and keys per head, with learned scales.
        norm_eps: epsilon of that norm.
        conv_size: width K of a causal depthwise convolution of the layer's input in front of the
            projections, by which a token's query, key and value know the K − 1 tokens before it, as those of
            memory layers do; 0 for none.

    Raises:
        ValueError: for sizes that do not divide, a rope_theta that is no positive number, or a negative
            conv_size.
    """

    has_surprise: ClassVar[bool] = False
    window: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        conv_size: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("num_heads", num_heads)
        check_count("num_kv_heads", num_kv_heads)
        check_rotary(hidden_size, num_heads, rope_theta)
        if not (fits(norm_eps, float) and norm_eps > 0):
            raise ValueError(f"norm_eps must be a positive number, got {norm_eps!r}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
        self.hidden_size, self.head_dim = hidden_size, hidden_size // num_heads
        self.num_kv_heads, self.grouped = num_kv_heads, num_kv_heads != num_heads
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.conv_size, self.conv = conv_size, short_conv(hidden_size, conv_size)

    def part_names(self) -> dict[str, str]:
        """Handles of the parts; see `nested_learning.parts`."""
        return {"": "projections"}

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        mask: Tensor | None = None,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend from x [B, T, D] to itself and to the tokens in `state`.

        Args:
            x: [B, T, D].
            state: from an earlier call on the same rows, None at the start. One of another dtype (a session
                saved by the model in another precision) is converted to that of the new keys and values.
            mask: [B, T] bool, True = real token; None if all are.
            documents, position_ids: where documents in a row begin, see `find_documents`. Positions are
                counted from each document's first token, and none sees another.

        Returns:
            y [B, T, D], zero at padded positions, and the state with the new tokens in it, those of each
            row's last document.

        Raises:
            ValueError: when x, mask or state do not fit.
        """
        self._check(x, state, mask)
        real = mask
        packed = find_documents(x, real, state is not None, documents, position_ids)
        if packed is not None:
            return self._read_documents(x, state, packed)
        x, tail = without_padding(x, real), None
        if self.conv is not None:
            x, tail = convolved(self.conv, x, None if state is None else state.conv_tail, real)
        positions = self._positions(x, state, real)
        query, key, value = self._project(x, positions)
        key_positions = positions
        if state is not None:
            key = torch.cat([state.key.to(key.dtype), key], dim=2)
            value = torch.cat([state.value.to(value.dtype), value], dim=2)
            key_positions = torch.cat([state.positions, positions], dim=1)

        # Only a whole, unpadded sequence has the plain triangle, for which there are faster kernels.
        triangle = state is None and real is None and (self.window is None or x.shape[1] <= self.window)
        y = self._attend(query, key, value, None if triangle else self._allowed(positions, key_positions))
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if real is not None:
            y = y.masked_fill(~real[..., None], 0)
        return y, self._remember(AttentionState(key, value, key_positions, tail), padded=real is not None)

    def _read_documents(
        self, x: Tensor, state: AttentionState | None, documents: Documents
    ) -> tuple[Tensor, AttentionState | None]:
        """`forward` where rows hold several documents, each attending to itself."""
        new, going_on, layout = documents.batches(state is not None)
        positions, tail = documents.positions(), None
        if state is not None:
            at = state.positions.amax(dim=1) + 1
            goes_on = documents.of_tokens(documents.goes_on(True))
            positions = positions + torch.where(goes_on, at.unsqueeze(1), 0)
        if self.conv is not None:  # a token may see as many inputs before it as its document has
            x, real = without_padding(x, documents.padded), documents.padded
            x, tail = convolved(self.conv, x, None if state is None else state.conv_tail, real, positions)
        vectors = self._project(x, positions)
        tokens_first = [t.transpose(1, 2) for t in vectors]  # [B, T, heads, d]
        batches = list(zip(*(documents.gather(t, layout) for t in tokens_first), strict=True))
        outputs: list[Tensor] = []
        for (_, length), _, _ in new:
            query, key, value = (t.transpose(1, 2) for t in batches[len(outputs)])
            inside = torch.arange(length, device=x.device).unsqueeze(0)
            whole = self.window is None or length <= self.window
            outputs.append(self._attend(query, key, value, None if whole else self._allowed(inside, inside)))
        if going_on is not None:
            assert state is not None
            _, real, rows = going_on
            query, key, value = (t.transpose(1, 2) for t in batches[-1])
            own = documents.gather(positions, layout)[-1].masked_fill(~real, -1)
            before = state.select_rows(rows)
            key = torch.cat([before.key.to(key.dtype), key], dim=2)
            value = torch.cat([before.value.to(value.dtype), value], dim=2)
            allowed = self._allowed(own, torch.cat([before.positions, own], dim=1))
            outputs.append(self._attend(query, key, value, allowed))
        y = documents.unpack([out.transpose(1, 2).flatten(2) for out in outputs], layout)
        assert y is not None
        y = self.out_proj(y)
        if documents.padded is not None:
            y = y.masked_fill(~documents.padded[..., None], 0)
        if not documents.keep:
            return y, None
        key, value = (t.flatten(0, 1) for t in tokens_first[1:])
        last = replace(self._last(state, documents, positions, key, value), conv_tail=tail)
        return y, self._remember(last, padded=True)

    def _last(
        self,
        state: AttentionState | None,
        documents: Documents,
        positions: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> AttentionState:
        """Keys and values of each row's last document, of all tokens' [B · T, heads, d]."""
        columns, real, goes_on = documents.last_tokens(state is not None)
        own = positions.flatten()[columns].masked_fill(~real, -1)
        key, value = (t.index_select(0, columns.flatten()).unflatten(0, columns.shape) for t in (key, value))
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        new = AttentionState(key, value, own)
        if state is None or not goes_on.any():
            return new
        before = state.positions.masked_fill(~goes_on.to(own.device).unsqueeze(1), -1)
        return AttentionState(
            torch.cat([state.key.to(key.dtype), key], dim=2),
            torch.cat([state.value.to(value.dtype), value], dim=2),
            torch.cat([before, own], dim=1),
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """y [B, H, T, d] of eq 62; `allowed` [B or 1, T, S] bool, None for the plain causal triangle."""
        with attention_kernels():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if allowed is None else allowed[:, None],
                is_causal=allowed is None,
                enable_gqa=self.grouped,
            )

    def _check(self, x: Tensor, state: AttentionState | None, mask: Tensor | None) -> None:
        check_sequence(x, self.hidden_size, mask, self.q_proj)
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
        tail = None if state.conv_tail is None else tuple(state.conv_tail.shape)
        wanted = (x.shape[0], self.conv_size - 1, self.hidden_size) if self.conv_size else None
        if tail != wanted:
            raise ValueError(
                f"state.conv_tail has shape {tail}, expected {wanted} for conv_size={self.conv_size}: the "
                "state belongs to a layer with another convolution"
            )

    def _positions(self, x: Tensor, state: AttentionState | None, real: Tensor | None) -> Tensor:
        """Place [B, T] of each token among its row's real tokens, −1 for padding."""
        batch_size, length, _ = x.shape
        if real is None:
            positions = torch.arange(length, device=x.device).expand(batch_size, length)
        else:
            positions = real.long().cumsum(dim=1) - 1
        if state is not None:
            positions = positions + state.positions.amax(dim=1, keepdim=True) + 1
        return positions if real is None else positions.masked_fill(~real, -1)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, d] and keys [B, H_kv, T, d], values [B, H_kv, T, d], all of one dtype."""
        query = normed(self.q_norm, self._heads(self.q_proj, x))
        key, value = self._keys_and_values(x)
        query, key = (rotate(vectors, positions, self.rope_theta) for vectors in (query, key))
        return query.to(value.dtype), key.to(value.dtype), value

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before rotation and values [..., H_kv, T, d] of x [..., T, D]."""
        return normed(self.k_norm, self._heads(self.k_proj, x)), self._heads(self.v_proj, x)

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """x [..., T, D] projected, [..., heads, T, d]."""
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def _allowed(self, positions: Tensor, key_positions: Tensor) -> Tensor:
        """Whether a query may see a key, [B, T, S] bool: real, not later, within the window (eq 63)."""
        query, key = positions[:, :, None], key_positions[:, None, :]
        allowed = (key >= 0) & (key <= query)
        if self.window is not None:
            allowed &= key > query - self.window
        # A row without any key would be a softmax over nothing: NaN. What padding reads does not matter.
        return allowed | (query < 0)

    def steady(self, state: AttentionState) -> AttentionState:
        """The state with empty columns in front, as many as it will hold: the window's, else two at least."""
        B, heads, length, width = state.key.shape
        columns = max(2 if self.window is None else max(self.window - 1, 1), length)
        if length == columns:
            return state
        key, value = (padded(t, (B, heads, columns, width)) for t in (state.key, state.value))
        return replace(state, key=key, value=value, positions=padded(state.positions, (B, columns)))

    def _remember(self, state: AttentionState, padded: bool) -> AttentionState:
        """The part of the state that later tokens can still see: with a window, its last real tokens."""
        if self.window is None:
            return state
        keep = max(self.window - 1, 1)  # one at least: it carries the row's position
        # Padding goes to the front, so that the cut never drops a real token for it; a state without later
        # padding stays in this order.
        return (state.tokens_last() if padded else state).last_columns(keep)


@register_mixer("sliding_window_attention")
class SlidingWindowAttention(Attention):
    """Attention of each token to itself and the `window` − 1 real tokens before it (eq 63).

    Its state holds the last window − 1 tokens at most, one at least.

    Args:
        window: number of tokens seen, at least 1. The others are those of `Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int,
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        conv_size: int = 0,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, rope_theta, qk_norm, norm_eps, conv_size)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window must be a positive number of tokens, got {window!r}")
        self.window = window
