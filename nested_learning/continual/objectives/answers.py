"""Answers of a model: its predictions of tokens, kept short, for a student to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeptAnswers:
    """Predictions of n tokens, over their k likeliest values each and all others as one outcome.

    Attributes:
        ids: the likeliest values int32 [n, k], the likeliest first.
        log_probs: their log-probabilities [n, k], float32 (float64 under a float64 model).
        rest: log of the probability [n] of all other values together.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> KeptAnswers:
        """The answers of logits [n, V]; k is at most V − 1."""
        all_probs = logits.detach().log_softmax(-1)
        log_probs, ids = all_probs.topk(min(top_k, logits.shape[-1] - 1), dim=-1)
        return cls(ids.to(torch.int32), log_probs, _others(all_probs, ids))

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, chosen: slice | Tensor) -> KeptAnswers:
        """The answers of some of the tokens."""
        return KeptAnswers(self.ids[chosen], self.log_probs[chosen], self.rest[chosen])

    @classmethod
    def joined(cls, parts: Sequence[KeptAnswers]) -> KeptAnswers:
        """Answers of several runs of tokens, one after the other."""
        columns = zip(*((part.ids, part.log_probs, part.rest) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(these answers ‖ softmax of logits [n, V]) over the k + 1 outcomes of each token, [n] nats."""
        log_q, ids = logits.log_softmax(-1), self.ids.long()
        theirs = torch.cat([log_q.gather(-1, ids), _others(log_q, ids)[:, None]], dim=-1)
        log_p = torch.cat([self.log_probs, self.rest[:, None]], dim=-1)
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - theirs), 0.0).sum(-1)


def _others(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability [n] of all values but ids [n, k], of log-probabilities [n, V].

    Summed up, not 1 − Σ p, which has no digits left where the k have nearly all.
    """
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
