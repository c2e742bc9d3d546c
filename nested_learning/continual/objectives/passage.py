"""Passages: tokens that were read, kept to be read again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Tokens of a text in their order. Never written to.

    Attributes:
        tokens: ids [n].
        learn: bool [n] on the CPU, whether the levels learn to predict each of them.
    """

    tokens: Tensor
    learn: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def joined(self, tokens: Tensor, learn: Tensor) -> KeptTokens:
        """The passage with further tokens behind."""
        return KeptTokens(torch.cat([self.tokens, tokens]), torch.cat([self.learn, learn]))

    def last(self, count: int) -> KeptTokens:
        """The last `count` tokens, or all where there are fewer, in storage of their own."""
        first = max(len(self) - count, 0)
        return KeptTokens(self.tokens[first:].clone(), self.learn[first:].clone())
