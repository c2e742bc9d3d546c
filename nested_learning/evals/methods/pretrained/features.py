"""Hidden states of a model behind prompts, by which texts are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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

    @torch.no_grad()
    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):  # a prompt does not see what fills it up behind
            row[: len(prompt)] = torch.tensor(prompt)
        states = self.model.base_model(
            input_ids=ids.to(self.model.device), output_hidden_states=True
        ).hidden_states
        for row, prompt in enumerate(prompts):
            found = self.known[prompt] = {}
            for depth, layer in self.layers.items():
                x = states[layer][row, : len(prompt)].float().cpu()
                found[depth, "mean"], found[depth, "last"] = x.mean(0), x[-1].clone()
