"""Accuracies of MAD: by class and by place, and the auto-encoder that compression is asked of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nested_learning.evals.fit import IGNORED, TaskBatch, answers
from nested_learning.models import HopeForCausalLM

BATCH = 128  # test sequences whose accuracy by class is averaged, as in mad-lab


def score(model: nn.Module, batch: TaskBatch) -> tuple[float, float]:
    """Accuracy by class and by place.

    The accuracy by class is the mean over batches of 128 sequences, not that of all of them: an id that is
    answered somewhere but asked nowhere is a class of its own, which counts in its batch alone.
    """
    given = [answers(model, ids) for ids in batch.ids.split(BATCH)]
    pieces = list(zip(given, batch.targets.split(BATCH), strict=True))
    weights = [len(targets) for _, targets in pieces]
    by_class = sum(
        weight * macro_accuracy(*piece) for weight, piece in zip(weights, pieces, strict=True)
    ) / sum(weights)
    return by_class, micro_accuracy(torch.cat(given), batch.targets)


def macro_accuracy(given: Tensor, targets: Tensor) -> float:
    """Mean over classes of the share of right answers, over the places whose target is not IGNORED.

    Classes are the ids that are asked or answered; of one that is answered but never asked nothing is right
    (torchmetrics' `MulticlassAccuracy`, whose average is "macro").
    """
    asked = targets != IGNORED
    given, targets = given[asked], targets[asked]
    size = int(max(given.max(), targets.max())) + 1
    right = torch.bincount(targets[given == targets], minlength=size).double()
    of_class = torch.bincount(targets, minlength=size)
    counted = of_class + torch.bincount(given, minlength=size) > 0
    return (right / of_class.clamp(min=1))[counted].mean().item()


def micro_accuracy(given: Tensor, targets: Tensor) -> float:
    """Share of right answers over the places whose target is not IGNORED."""
    asked = targets != IGNORED
    return (given == targets)[asked].double().mean().item()


class Reconstruction(NamedTuple):
    """Logits [B, T, V] of the sequence that was read."""

    logits: Tensor


class AutoEncoder(nn.Module):
    """A model's state at the last token, from which every token is read off again.

    The state is added to a fixed code of each place, sines and cosines of wave lengths from 2 π to 10⁴ · 2 π,
    and an MLP of two layers gives the logits.

    Args:
        model: whose trunk reads; its own head is left out.
        length: tokens of a sequence.
    """

    places: Tensor

    def __init__(self, model: HopeForCausalLM, length: int) -> None:
        super().__init__()
        self.trunk, self.config = model.model, model.config
        width = self.config.hidden_size
        layers = []
        for _ in range(2):
            layers += [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, self.config.vocab_size))
        for module in self.decoder:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.register_buffer("places", place_code(length, width), persistent=False)

    def forward(self, ids: Tensor) -> Reconstruction:
        """Logits [B, T, V] of the ids [B, T], of the length that was given."""
        last = self.trunk(ids, use_cache=False).last_hidden_state[:, -1]
        return Reconstruction(self.decoder(last[:, None] + self.places))


def place_code(length: int, width: int) -> Tensor:
    """Sines, then cosines, of the places [length, width]; an odd last column is 0."""
    half = width // 2
    frequency = torch.exp(torch.arange(half) * (-math.log(10_000) / max(1, half - 1)))
    angle = torch.arange(length)[:, None] * frequency
    code = torch.cat((angle.sin(), angle.cos()), dim=1)
    return nn.functional.pad(code, (0, width % 2))
