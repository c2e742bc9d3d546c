"""Sliding-window attention with persistent tokens: learned keys and values that every query sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nested_learning.layers.attention.softmax import SlidingWindowAttention
from nested_learning.layers.token_inputs import check_count


class PersistentWindowAttention(SlidingWindowAttention):
    """Sliding-window attention in which learned tokens p in front never leave the window (Titans, arXiv
    2501.00663, §3.3: knowledge of the task, independent of the input).

    The tokens have no position: they are not rotated.

    Args:
        hidden_size, num_heads, window: as in `SlidingWindowAttention`.
        persistent_tokens: their number, 0 or more.
    """

    def __init__(self, hidden_size: int, num_heads: int, window: int, persistent_tokens: int) -> None:
        super().__init__(hidden_size, num_heads, window)
        check_count("persistent_tokens", persistent_tokens, least=0)
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Like normalised inputs: N(0, 1)."""
        nn.init.normal_(self.persistent)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        P, T = len(self.persistent), query.shape[2]
        if P == 0:
            return super()._attend(query, key, value, allowed)
        if allowed is None:
            allowed = torch.ones(1, T, T, dtype=torch.bool, device=query.device).tril()
        extra = []
        for projection, norm in ((self.k_proj, self.k_norm), (self.v_proj, None)):
            heads = projection(self.persistent.to(projection.weight.dtype)).unflatten(-1, (-1, self.head_dim))
            if norm is not None:
                heads = norm(heads.to(norm.weight.dtype))
            extra.append(heads.transpose(0, 1).expand(len(query), -1, -1, -1).to(value.dtype))
        key, value = torch.cat([extra[0], key], dim=2), torch.cat([extra[1], value], dim=2)
        seen = allowed.new_ones(1, 1, 1).expand(*allowed.shape[:2], P)
        return super()._attend(query, key, value, torch.cat([seen, allowed], dim=-1))
