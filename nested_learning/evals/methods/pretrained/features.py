"""Hidden states of a model behind prompts, by which texts are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.labels.hidden_features import POOLINGS, pooled_states

DEPTHS = (0.33, 0.67, 1.0)


class Features:
    """The model's hidden states behind prompts, pooled; each prompt is read once, whatever is asked of it.

    Args:
        model: the base model.
        depths: relative depths of the layers that are kept, from 0 (the embedding) to 1 (the last layer).
        batch: prompts of one pass.
    """

    def __init__(self, model: Any, depths: Sequence[float] = DEPTHS, batch: int = 16) -> None:
        self.model, self.batch = model, batch
        self.layers = {depth: round(depth * model.config.num_hidden_layers) for depth in depths}
        self.known: dict[tuple[int, ...], dict[tuple[float, str], Tensor]] = {}

    def of(self, prompts: Sequence[Sequence[int]], depth: float, pooling: str) -> Tensor:
        """Features [prompts, D], float64, CPU: the "mean" over each prompt's tokens, or its "last" one."""
        keys = [tuple(prompt) for prompt in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        for start in range(0, len(new), self.batch):
            self._read(new[start : start + self.batch])
        return torch.stack([self.known[key][depth, pooling] for key in keys]).double()

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        for prompt, states in zip(
            prompts, pooled_states(self.model, prompts, list(self.layers.values())), strict=True
        ):
            self.known[prompt] = {
                (depth, pooling): states[layer, pooling]
                for depth, layer in self.layers.items()
                for pooling in POOLINGS
            }
