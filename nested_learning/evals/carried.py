"""Reading of long sequences in pieces, the state carried, and answering from the state."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.memory.state import State
from nested_learning.models import HopeForCausalLM
from nested_learning.models.hope.cache_hope import HopeCache


class CarriedReader:
    """A model and its states after what it has read; they grow only where attention keeps tokens.

    Args:
        model: the model; it is put into evaluation mode.
        piece: tokens that are read at once.
        bound: tokens that attention keeps, the last ones: those before them are forgotten.
    """

    def __init__(self, model: HopeForCausalLM, piece: int, bound: int) -> None:
        self.model, self.piece, self.bound = model.eval(), piece, bound
        self.cache = HopeCache(model.config)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] on from where the reader stands; the most probable next id [B, 1], on the CPU."""
        for start in range(0, ids.shape[1], self.piece):
            given = ids[:, start : start + self.piece].to(self.model.device)
            logits = self.model(given, past_key_values=self.cache, logits_to_keep=1).logits
            self.cache.states = {name: self._bounded(state) for name, state in self.cache.states.items()}
        return logits.argmax(-1).cpu()

    def rows(self, index: Tensor) -> CarriedReader:
        """A reader that goes on from the states of the rows `index` [B'] on its own way."""
        other = self.anew()
        other.cache = self.cache.select_rows(index.to(self.model.device))
        return other

    def anew(self) -> CarriedReader:
        """A reader of the same model that has read nothing."""
        return CarriedReader(self.model, self.piece, self.bound)

    def _bounded(self, state: State) -> State:
        if not isinstance(state, AttentionState) or state.positions.shape[1] <= self.bound:
            return state
        kept = slice(-self.bound, None)
        key, value = state.key[:, :, kept], state.value[:, :, kept]
        return replace(state, key=key, value=value, positions=state.positions[:, kept])
