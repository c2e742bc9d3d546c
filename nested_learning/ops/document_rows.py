"""Where documents in a row begin, and what follows from that about tokens and rows (spec section 8).

Where they begin decides what is computed, so all of this is on the CPU, whatever torch's default device is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DocumentRows:
    """Where the documents of a batch of rows begin. Waits for the device only when it is made.

    Args:
        begins: [B, T] bool, tokens that begin a document. A row's first real token that does not begin one
            goes on with the row's state, if there is one.
        real: [B, T] bool, False = padding, which belongs to no document; None: there is none.
        keep: whether the states after the rows' last documents are wanted.
        device: where the tokens are, if `begins` is not there.

    Attributes:
        padded: `real`.
        starts: [D] int64 on the CPU, for each document its first token among all real ones, row after row.
        lengths, rows: [D] int64 on the CPU, its number of tokens and its row.
    """

    def __init__(
        self,
        begins: Tensor,
        real: Tensor | None = None,
        keep: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.shape, self.padded, self.keep = begins.shape, real, keep
        self.device = device or begins.device
        B, T = begins.shape
        begins = begins.cpu().flatten()  # here the device is waited for
        if real is None:
            self.tokens = torch.arange(B * T, device="cpu")  # [N], places of the real tokens
        else:
            self.tokens = real.cpu().flatten().nonzero().squeeze(1)
            begins = begins[self.tokens]
        row = self.tokens // max(T, 1)
        first = torch.ones_like(begins)  # of its row
        first[1:] = row[1:] != row[:-1]
        self.starts = (begins | first).nonzero().squeeze(1)
        self.lengths = torch.diff(self.starts, append=self.starts.new_tensor([len(self.tokens)]))
        self.rows = row[self.starts]
        self._goes_on = ~begins[self.starts]

    def __len__(self) -> int:
        return len(self.lengths)

    def goes_on(self, given: bool) -> Tensor:
        """[D] bool on the CPU: which documents go on with their row's state, where one is `given`."""
        return self._goes_on if given else torch.zeros_like(self._goes_on)

    def last(self) -> Tensor:
        """[D] bool on the CPU: which documents are the last of their row."""
        last = torch.ones_like(self._goes_on)
        last[:-1] = self.rows[1:] != self.rows[:-1]
        return last

    def positions(self) -> Tensor:
        """[B, T] int64: the place of each token in its document, from 0 in this call; 0 for padding."""
        inside = torch.arange(len(self.tokens), device="cpu") - self.starts.repeat_interleave(self.lengths)
        return self._to_rows(inside)

    def of_tokens(self, value: Tensor) -> Tensor:
        """[B, T]: of a value [D] on the CPU, that of each token's document; 0 or False for padding."""
        return self._to_rows(value.repeat_interleave(self.lengths))

    def _to_rows(self, value: Tensor) -> Tensor:
        """[B, T] on the device, of values [N] of all real tokens on the CPU."""
        flat = value.new_zeros(self.shape[0] * self.shape[1])
        flat[self.tokens] = value
        return flat.view(self.shape).to(self.device)

    def last_tokens(self, given: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of each row's last document.

        Returns:
            columns [B, L] int64 as in `ReadingStep`, which of them are `real` [B, L] bool, and, on the CPU,
            the rows [B] bool whose last document goes on with their state, those without a token among them.
        """
        B = self.shape[0]
        last = self.last()
        starts, lengths = torch.zeros(2, B, dtype=torch.long, device="cpu")
        goes_on = torch.full((B,), given, device="cpu")
        rows = self.rows[last]
        starts[rows], lengths[rows] = self.starts[last], self.lengths[last]
        goes_on[rows] = self.goes_on(given)[last]
        inside = torch.arange(int(lengths.max()), device="cpu").expand(B, -1)
        real = inside < lengths.unsqueeze(1)
        columns = self.tokens[(starts.unsqueeze(1) + inside).where(real, 0)]
        return columns.to(self.device), real.to(self.device), goes_on
