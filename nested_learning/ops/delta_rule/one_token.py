"""The recurrence for one token as it stands (spec section 4): no decays within a chunk, no solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.delta_rule.chunk import Chunk, Decay


class OneToken:
    """A `Chunk` of one token; arguments, reads and the final state are those of `Chunk`.

    S ← μ S + a xᵀ,  W ← α W + (1 − α) W_init − erase (W x) xᵀ + write S;  without momentum S is a xᵀ.

    Args:
        alpha, mu: [..., 1] the decays themselves, where a `Chunk` has their products.
        The others: as those of `Chunk`, with C = 1.
    """

    def __init__(
        self,
        W: Tensor,
        x: Tensor,
        a: Tensor,
        alpha: Tensor,
        erase: Tensor | None = None,
        S: Tensor | None = None,
        mu: Tensor | None = None,
        write: Tensor | None = None,
        W_init: Tensor | None = None,
        Wx: Tensor | None = None,
    ) -> None:
        self._before, self._x = W, x
        left = alpha.unsqueeze(-1)
        W = left * W if W_init is None else torch.lerp(W_init, W, left)
        if mu is None:
            written = a if write is None else a * write.unsqueeze(-1)
        else:
            column = a.mT  # [..., d_out, 1]: products with it are those of broadcasting
            S = column * x if S is None else torch.addcmul(mu.unsqueeze(-1) * S, column, x)
            W = W + S if write is None else torch.addcmul(W, write.unsqueeze(-1), S)
            written = None
        if erase is not None:
            answer = self.answer_before() if Wx is None else Wx
            erased = erase.unsqueeze(-1) * answer
            written = -erased if written is None else written - erased
        self.W = W if written is None else torch.addcmul(W, written.mT, x)
        self.S = S

    def select_last(self, dim: int) -> OneToken:
        """The token's weights of the last index along `dim`, for reads."""
        part = object.__new__(OneToken)
        part.W = self.W.narrow(dim, self.W.shape[dim] - 1, 1)
        return part

    def read(self, q: Tensor) -> Tensor:
        """W q after the write, q [..., 1, d_in] -> [..., 1, d_out]."""
        return q @ self.W.mT

    def read_transposed(self, q: Tensor) -> Tensor:
        """Wᵀ q after the write, q [..., 1, d_out] -> [..., 1, d_in]."""
        return q @ self.W

    def answer_before(self) -> Tensor:
        """W x of the weights as the token arrives [..., 1, d_out]."""
        return self._x @ self._before.mT

    def final(self) -> tuple[Tensor, Tensor | None]:
        """(W, S) after the token; S is None without momentum."""
        return self.W, self.S


# What takes the tokens of a step in, and the decays as it has them: for one token, and for several.
ONE: tuple[Any, Any] = OneToken, torch.exp
SEVERAL: tuple[Any, Any] = Chunk, Decay
