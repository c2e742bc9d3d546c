"""Sliding-window attention with persistent tokens: learned keys and values that every query sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.attention.softmax import SlidingWindowAttention
from nested_learning.layers.effective import input_dtype, refuse_change_per_row
from nested_learning.layers.token_inputs import check_count


class PersistentWindowAttention(SlidingWindowAttention):
    """Sliding-window attention over [p; x], where the learned tokens p never leave the window.

    They hold knowledge of the task, independent of the input (Titans, arXiv 2501.00663, §3.3). They have no
    position, so their keys are not rotated, and they take no room in the window.

    Args:
        hidden_size, num_heads, window, rope_theta: as in `SlidingWindowAttention`.
        persistent_tokens: number of learned tokens p, 0 or more.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int,
        persistent_tokens: int,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        super().__init__(hidden_size, num_heads, window, rope_theta=rope_theta)
        check_count("persistent_tokens", persistent_tokens, least=0)
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw p from N(0, 1), the scale of normalised inputs."""
        nn.init.normal_(self.persistent)

    def part_names(self) -> dict[str, str]:
        return {"": "projections", "persistent": "persistent"}

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        P, T = len(self.persistent), query.shape[2]
        if P == 0:
            return super()._attend(query, key, value, allowed)
        if allowed is None:
            allowed = torch.ones(1, T, T, dtype=torch.bool, device=query.device).tril()
        for projection in (self.k_proj, self.v_proj):
            refuse_change_per_row(projection)
        p_key, p_value = (
            vectors.expand(len(value), -1, -1, -1).to(value.dtype)  # in this order rows are summed in float32
            for vectors in self._keys_and_values(self.persistent.to(input_dtype(self.k_proj)))
        )
        key, value = torch.cat([p_key, key], dim=2), torch.cat([p_value, value], dim=2)
        return super()._attend(query, key, value, F.pad(allowed, (P, 0), value=True))
