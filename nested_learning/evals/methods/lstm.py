"""An LSTM: the check of a harness by a model of which it is known what it learns."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nested_learning.evals.methods.models import MODELS, Size, TrainedModel
from nested_learning.models import HopeConfig


@dataclass(frozen=True)
class TrainedLSTM(TrainedModel):
    """An LSTM that a task trains, with about as many parameters as the Transformer of the size.

    Its hidden width is solved for, so that the count is within a few per cent; the report prints it.
    """

    mixer: str = "lstm"

    def config(self, size: Size) -> HopeConfig:
        """No configuration: ValueError."""
        raise ValueError(f"{self.name!r} is a torch.nn.LSTM and has no HopeConfig")

    def new_model(self, size: Size, seed: int) -> nn.Module:
        """An LSTM with random weights: `model(ids).logits` are [B, T, vocab_size]."""
        with torch.device("meta"):
            wanted = sum(p.numel() for p in MODELS[0].new_model(size, seed).parameters())
        counts = {hidden: _count(size, hidden) for hidden in range(2, 16 * size.width)}
        hidden = min(counts, key=lambda each: abs(counts[each] - wanted))
        torch.manual_seed(seed)
        return LSTMModel(size.vocab_size, size.width, hidden, size.layers)


class LSTMState(NamedTuple):
    """Hidden state and cell of every layer, both [layers, B, hidden]."""

    hidden: Tensor
    cell: Tensor

    def nbytes(self) -> int:
        """Bytes of both."""
        return self.hidden.nbytes + self.cell.nbytes


class LSTMModel(nn.Module):
    """Embedding, LSTM, head.

    Args:
        vocab_size: ids.
        width: of the embedding.
        hidden: width of the LSTM.
        layers: of the LSTM.
    """

    def __init__(self, vocab_size: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocab_size)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        """Logits [B, T, vocab_size] of ids [B, T] as `logits`, the state at the end as `past_key_values`."""
        y, state = self.lstm(self.embedding(ids))
        return SimpleNamespace(logits=self.head(y), past_key_values=LSTMState(*state) if use_cache else None)


def _count(size: Size, hidden: int) -> int:
    """Parameters of `LSTMModel`: four gates with two biases each per layer."""
    inputs = [size.width] + [hidden] * (size.layers - 1)
    gates = sum(4 * hidden * (wide + hidden + 2) for wide in inputs)
    return size.vocab_size * size.width + gates + (hidden + 1) * size.vocab_size


LSTM = TrainedLSTM("lstm")
