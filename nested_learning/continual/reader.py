"""Reading text with a row's deltas: next-token losses, and their gradients for the levels that learn.

Tokens are read in windows of at most `window` positions. Within a window the keys and values of earlier
tokens, or the states of recurrent layers, are kept as they were computed when those tokens were read, and no
gradient flows into them. When a
segment does not fit any more, a new window begins with the last `overlap` tokens, read again with the
weights of now. All of that depends on token positions alone, so it does not matter in what pieces a text
comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.continual.context import Context, ContextReader, checkpointed, evaluating
from nested_learning.continual.deltas import Row
from nested_learning.continual.lesson import Lesson, Pairs
from nested_learning.continual.objectives.anchors import NO_ANCHORS, Anchors
from nested_learning.continual.objectives.answers import KeptAnswers
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.weights import Workspace
from nested_learning.continual.writing import DeltaWriter
from nested_learning.memory.state import Weights


class Reader:
    """Reads for any row. A row changes only when a pass is complete, not when one fails.

    Args:
        model: the base model.
        writers: one per level.
        plan: how to read.
        anchors: what holds the levels to the base model.
    """

    def __init__(
        self, model: Any, writers: Sequence[DeltaWriter], plan: ReadingPlan, anchors: Anchors = NO_ANCHORS
    ) -> None:
        self.model = model
        self.writers = writers
        self.plan = plan
        self.anchors = anchors
        self.contexts = ContextReader(model)
        self.workspace = Workspace.of(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "workspace"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, workspace=Workspace.of(state["model"]))  # that of the copied model

    def score(self, row: Row, ids: Tensor, learn: Tensor) -> Tensor:
        """Next-token losses [n] (nats) of tokens inside one segment; nothing is learned yet.

        `learn`, bool [n] on the CPU, is kept for the end of the segment. The row moves on by the n tokens.
        The loss of a token that nothing comes before is NaN.
        """
        with torch.no_grad(), self.workspace.installed(self.writers, row), evaluating(self.model):
            self._begin_segment(row)
            before = row.context if row.resume is None else row.resume
            tokens = torch.cat([row.tokens, ids])
            losses, context = self.losses(tokens[len(row.context) :], row.context)
        row.tokens, row.learn = tokens, torch.cat([row.learn, learn])
        row.context, row.position = context, row.position + len(ids)
        row.resume = None if context.is_croppable else before
        return _padded(losses, len(ids))

    def read_segment(self, row: Row, ids: Tensor, learn: Tensor) -> tuple[Tensor, Lesson]:
        """Read the segment that ends with `ids`; those of its tokens that were scored before once more.

        Args:
            row: the row that reads.
            ids: [n].
            learn: bool [n] on the CPU, whether levels learn to predict each of `ids`.

        Returns:
            next-token losses [n] (nats) of `ids`, and what the segment taught. The row moves on by the n
            tokens, to the start of the next segment; its levels are left alone.
        """
        begins_at = row.position - (len(row.tokens) - row.start)
        crossing_learns = any(w.learns and begins_at % w.level.chunk_size for w in self.writers)
        with self.learning(row) as leaves:
            self._begin_segment(row)
            tokens, learn = torch.cat([row.tokens, ids]), torch.cat([row.learn, learn])
            start = row.start
            answers = [row.answers] if row.answers else []
            keep = answers if self.plan.distill_top_k and start >= self.plan.half else None
            # The last token before the segment is read in a pass of its own, also if it was read before: it
            # predicts the segment's first token, and the gradient of that pair is wanted by itself.
            first = max(start - 1, 0)
            crossing, context, crossing_grads = self.read_pairs(
                tokens[first : start + 1] if start else tokens[:0],
                learn[start : start + 1] if start else learn[:0],
                row.context.crop(first) if row.resume is None else row.resume,
                leaves if crossing_learns else {},
                keep,
            )
            inside, context, inside_grads = self.read_pairs(
                tokens[start:], learn[start + 1 :], context, leaves, keep
            )
        row.tokens, row.learn, row.start, row.resume = tokens, learn, len(tokens), None
        row.context, row.position = context, row.position + len(ids)
        row.answers = KeptAnswers.joined(answers) if answers else None
        losses = torch.cat([crossing, inside])
        learn = learn[len(learn) - len(losses) :]
        parts = learn.split([len(crossing), len(inside)])
        sums = [losses.sum(), learned_sum(crossing, parts[0]), learned_sum(inside, parts[1])]
        everything, *learned = torch.stack(sums).tolist()  # the only host synchronisation
        counts = [int(part.sum()) for part in parts]
        lesson = Lesson(
            begins_at,
            crossing=Pairs(counts[0], learned[0], crossing_grads),
            inside=Pairs(counts[1], learned[1], inside_grads),
            is_finite=math.isfinite(everything),
            losses=losses,
        )
        return _padded(losses, len(ids)), lesson

    def _begin_segment(self, row: Row) -> None:
        """At the start of a segment, begin a new window if the whole segment does not fit in this one."""
        if row.start < len(row.tokens):
            return  # the segment has begun
        row.resume = None
        if self.plan.window_ends(len(row.tokens), row.position):
            # Keys carry the positions that their tokens had in the old window, so they cannot be taken along:
            # the kept tokens are read again from position 0 on. The last of them is read with the segment.
            kept = row.tokens[max(len(row.tokens) - self.plan.overlap, 0) :]
            row.context = self.context_of(kept[:-1])
            row.tokens, row.learn = kept, row.learn[len(row.learn) - len(kept) :]
            row.answers = None
        row.start = len(row.tokens)

    def context_of(self, tokens: Tensor) -> Context:
        """Context of tokens [n] read from position 0 on with the weights in force, without gradient."""
        return self.contexts.context_of(self.model, tokens)

    @contextmanager
    def learning(self, row: Row) -> Iterator[Weights]:
        """The model learns with the row's deltas in force inside the scope, without dropout.

        Yields:
            the leaf of each matrix that wants a gradient, by `DeltaWriter.keys`.
        """
        checkpointing = checkpointed(self.model) if self.plan.gradient_checkpointing else nullcontext()
        installed = self.workspace.installed(self.writers, row, learning=True)
        with installed as leaves, evaluating(self.model), checkpointing:
            yield leaves

    def read_pairs(
        self,
        tokens: Tensor,
        learn: Tensor,
        context: Context,
        leaves: Weights,
        answers: list[KeptAnswers] | None = None,
    ) -> tuple[Tensor, Context, Weights]:
        """Read pairs of neighbouring tokens.

        Args:
            tokens: ids [n].
            learn: bool [n − 1] on the CPU, whether the second token of each pair is learned.
            context: keys and values of all tokens before.
            leaves: tensors that want a gradient, by key.
            answers: list that gets the predictions of the pairs' second tokens; None to keep none.

        Returns:
            losses [n − 1], the context after reading all tokens but the last, and the gradients, by key, of
            the sum of the losses that are learned; none where nothing is.
        """
        learns = bool(leaves) and bool(learn.any())
        with torch.set_grad_enabled(learns):
            losses, context = self.losses(tokens, context, answers)
            if not learns:
                return losses, context, {}
            grads = gradients(learned_sum(losses, learn), leaves)
        return losses.detach(), context, grads

    def losses(
        self, tokens: Tensor, context: Context, answers: list[KeptAnswers] | None = None
    ) -> tuple[Tensor, Context]:
        """Losses [n − 1] of tokens[1:] given all before, and the context after reading tokens[:-1]."""
        if len(tokens) < 2:
            dtype = torch.promote_types(self.model.dtype, torch.float32)
            return torch.empty(0, dtype=dtype, device=tokens.device), context
        logits, context = self.predict(tokens[:-1], context)
        if answers is not None:
            answers.append(KeptAnswers.of(logits, self.plan.distill_top_k))
        return F.cross_entropy(logits, tokens[1:], reduction="none"), context

    def predict(self, tokens: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Logits [n, V] after each of tokens [n], float32 at least, and the context after reading them."""
        (logits,), context = self.contexts.read(self.model, tokens[None], context)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), context


def gradients(total: Tensor, leaves: Weights) -> Weights:
    """Gradients of a scalar by the leaves' keys, without those that it does not depend on."""
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {key: g for key, g in zip(leaves, found, strict=True) if g is not None}


def learned_sum(losses: Tensor, learn: Tensor) -> Tensor:
    """Sum [] of those losses [n] that are learned (`learn`, bool [n] on the CPU)."""
    if bool(learn.all()):
        return losses.sum()
    return torch.where(learn.to(losses.device, non_blocking=True), losses, 0.0).sum()


def _padded(losses: Tensor, length: int) -> Tensor:
    """The last `length` losses, NaN in front where there are fewer."""
    losses = losses[max(len(losses) - length, 0) :]
    return F.pad(losses, (length - len(losses), 0), value=float("nan"))
