"""Reading text with a row's deltas: next-token losses, and their gradients for the levels that learn.

Tokens are read in windows of at most `window` positions. Within a window the keys and values of earlier
tokens are kept as they were computed when those tokens were read, and no gradient flows into them. When a
segment does not fit any more, a new window begins with the last `overlap` tokens, read again with the
weights of now. All of that depends on token positions alone, so it does not matter in what pieces a text
comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.continual.context import Context, checkpointed, evaluating
from nested_learning.continual.deltas import Row, Slots
from nested_learning.continual.level import Segments
from nested_learning.continual.weights import Workspace
from nested_learning.continual.writing import LevelWriter


@dataclass(frozen=True)
class ReadingPlan:
    """How far reading goes in one pass, and how much it sees of what came before.

    Args:
        segments: where reading pauses.
        window: positions of the attention context, the segment itself included.
        overlap: tokens that a new window begins with.
        gradient_checkpointing: run the layers twice to keep less.
    """

    segments: Segments
    window: int
    overlap: int
    gradient_checkpointing: bool

    def describe(self) -> dict[str, int]:
        """What decides how a text is read, as JSON values."""
        return {"segment": self.segments.longest, "window": self.window, "overlap": self.overlap}


@dataclass(frozen=True)
class Pairs:
    """Some pairs of neighbouring tokens that were read.

    Attributes:
        losses: [n] next-token losses in nats.
        mask: bool [n] on the CPU, which of them are learned.
        grads: gradient of the sum of those, by key (see `LevelWriter.keys`); empty where nothing learns.
        total: that sum.
    """

    losses: Tensor
    mask: Tensor
    grads: Slots
    total: float = 0.0

    @property
    def learned(self) -> int:
        """How many are learned."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Segment:
    """What a segment taught: `crossing`, the pair of the last token before it and its first token (no pair
    at the start of a text), and `inside`, the pairs inside. `is_finite` tells whether all losses are, learned
    or not."""

    crossing: Pairs
    inside: Pairs
    is_finite: bool


class Reader:
    """Reads for any row. A row changes only when a pass is complete, not when one fails.

    Args:
        model: the base model.
        writers: one per level.
        plan: how to read.
    """

    def __init__(self, model: Any, writers: Sequence[LevelWriter], plan: ReadingPlan) -> None:
        self.model = model
        self.writers = writers
        self.plan = plan
        self.workspace = Workspace.of(model)

    def score(self, row: Row, ids: Tensor, mask: Tensor) -> Tensor:
        """Next-token losses [n] (nats) of tokens inside one segment; nothing is learned yet.

        `mask`, bool [n] on the CPU, is kept for the end of the segment. The row moves on by the n tokens.
        The loss of a token that nothing comes before is NaN.
        """
        with torch.no_grad(), self.workspace.installed(self.writers, row), evaluating(self.model):
            self._begin(row)
            tokens = torch.cat([row.tokens, ids])
            losses, context = self.losses(tokens[len(row.context) :], row.context)
            mask = torch.cat([row.mask, mask])
        row.tokens, row.mask, row.context, row.position = tokens, mask, context, row.position + len(ids)
        return _padded(losses, len(ids))

    def read_segment(self, row: Row, ids: Tensor, mask: Tensor) -> tuple[Tensor, Segment]:
        """Read the segment that ends with `ids`; those of its tokens that were scored before once more.

        Args:
            row: that reads.
            ids: [n].
            mask: bool [n] on the CPU, whether levels learn to predict each.

        Returns:
            next-token losses [n] (nats) of `ids`, and what the segment taught. The row moves on by the n
            tokens, to the start of the next segment; its levels are left alone.
        """
        begins_at = row.position - (len(row.tokens) - row.start)
        crossing_learns = any(w.learns and begins_at % w.size for w in self.writers)
        checkpointing = checkpointed(self.model) if self.plan.gradient_checkpointing else nullcontext()
        with self.workspace.installed(self.writers, row, learning=True) as leaves, evaluating(self.model):
            self._begin(row)
            tokens, start = torch.cat([row.tokens, ids]), row.start
            mask = torch.cat([row.mask, mask])
            pair = slice(start - 1, start + 1) if start else slice(0)
            context = row.context.crop(max(start - 1, 0))
            with checkpointing:
                crossing, context = self.learn(
                    tokens[pair], mask[pair], context, leaves if crossing_learns else {}
                )
                inside, context = self.learn(tokens[start:], mask[start:], context, leaves)
        row.tokens, row.mask, row.start = tokens, mask, len(tokens)
        row.context, row.position = context, row.position + len(ids)
        losses = torch.cat([crossing.losses, inside.losses])
        totals = [losses.sum(), *(masked_sum(part.losses, part.mask) for part in (crossing, inside))]
        everything, *learned = torch.stack(totals).tolist()  # the only host synchronisation
        crossing, inside = (replace(p, total=t) for p, t in zip((crossing, inside), learned, strict=True))
        return _padded(losses, len(ids)), Segment(crossing, inside, math.isfinite(everything))

    def _begin(self, row: Row) -> None:
        """At the start of a segment, begin a new window if the whole segment does not fit in this one."""
        if row.start < len(row.tokens):
            return  # the segment has begun
        length = self.plan.segments.end(row.position) - row.position
        if len(row.tokens) + length > self.plan.window:
            kept = row.tokens[max(len(row.tokens) - self.plan.overlap, 0) :]
            row.context, row.tokens = self._context(kept[:-1]), kept
            row.mask = row.mask[len(row.mask) - len(kept) :]
        row.start = len(row.tokens)

    @torch.no_grad()
    def _context(self, ids: Tensor) -> Context:
        """The context after `ids`, without their logits."""
        if not len(ids):
            return Context()
        cache = Context().open()
        self.model.base_model(input_ids=ids[None], past_key_values=cache, use_cache=True)
        return Context.closed(cache)

    def learn(self, tokens: Tensor, mask: Tensor, context: Context, leaves: Slots) -> tuple[Pairs, Context]:
        """The pairs of neighbouring `tokens`, and the context after reading all but the last."""
        mask = mask[1:]
        learns = bool(leaves) and bool(mask.any())
        with torch.set_grad_enabled(learns):
            losses, context = self.losses(tokens, context)
            if not learns:
                return Pairs(losses, mask, {}), context
            wanted = masked_sum(losses, mask)
            found = torch.autograd.grad(wanted, list(leaves.values()), allow_unused=True)
        grads = {key: g for key, g in zip(leaves, found, strict=True) if g is not None}
        return Pairs(losses.detach(), mask, grads), context

    def losses(self, tokens: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Losses [n − 1] of tokens[1:] given all before, and the context after reading tokens[:-1]."""
        if len(tokens) < 2:
            return torch.empty(0, device=tokens.device), context
        cache = context.open()
        output = self.model(input_ids=tokens[None, :-1], past_key_values=cache, use_cache=True)
        logits = output.logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, tokens[1:], reduction="none"), Context.closed(cache)


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum [] of those losses [n] whose mask (bool [n] on the CPU) is True."""
    if bool(mask.all()):
        return losses.sum()
    return torch.where(mask.to(losses.device, non_blocking=True), losses, 0.0).sum()


def _padded(losses: Tensor, length: int) -> Tensor:
    """The last `length` losses, NaN in front where there are fewer."""
    losses = losses[max(len(losses) - length, 0) :]
    return F.pad(losses, (length - len(losses), 0), value=float("nan"))
