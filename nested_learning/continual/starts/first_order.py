"""First order: the writes that were made are taken as given, and only how much of them is asked.

At the segment k of a text, a level's delta on a matrix w is

    Δ_k = S_k Δ⁰ + P_k,   P_k = − lr · r_w · Σ_j (what decay has left of) d_j,

the start as far as decay has left it, and what its writes j before the segment have made, each in a direction
d_j = rule(clip(G_j))_w. Taking S_k and every d_j as constants, the mean loss L of the text's N pairs has

    ∂L/∂Δ⁰_w = 1/N Σ_k S_k ⊙ g_k,   ∂L/∂(log r_w) = 1/N Σ_k ⟨g_k, P_k⟩,

where g_k is the gradient of the losses of segment k by Δ_k, each token given all before it: what
backpropagation computes for the writes themselves. (Keys and values of earlier tokens are constants too, as
they are for the writes.) So a text costs what adapting to it costs. How a start changes later directions, and
how a rate changes the gradients after its first write, is left out: `exact` has both.

The writes are the learner's own: every option of levels acts in them, re-reading, distillation, anchors and
sparse writes among them. But for one: a level that takes over another one's delta (`consolidate`) has not
what its own writes have made, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.lesson import Lesson
from nested_learning.continual.objectives.answers import KeptAnswers
from nested_learning.continual.reader import Reader
from nested_learning.continual.starts.gradient import Beginning, MetaGradient, StartShares
from nested_learning.continual.study import study
from nested_learning.continual.writing import DeltaWriter, accumulate
from nested_learning.memory.state import Weights


class MetaReader(Reader):
    """A reader that adds the gradient of every loss to that of rates and starts.

    Args:
        inner: the reader whose model, writers and way of reading are used.
        begin: rates and starts.
    """

    def __init__(self, inner: Reader, begin: Beginning) -> None:
        super().__init__(inner.model, inner.writers, inner.plan, inner.anchors)
        self.begin = begin
        self.shares = StartShares.of(inner.writers)
        self.total = MetaGradient.zero(begin)
        self._leaves: Weights = {}
        self._grads: Weights = {}

    @contextmanager
    def learning(self, row: Row) -> Iterator[Weights]:
        with super().learning(row) as leaves:
            self._leaves = leaves
            yield leaves

    def read_pairs(
        self,
        tokens: Tensor,
        learn: Tensor,
        context: Context,
        leaves: Weights,
        answers: list[KeptAnswers] | None = None,
    ) -> tuple[Tensor, Context, Weights]:
        # all losses count here, also that of a pair from which no level learns
        losses, context, grads = super().read_pairs(tokens, learn, context, self._leaves, answers)
        accumulate(self._grads, grads)
        return losses, context, {key: g for key, g in grads.items() if key in leaves}

    def read_segment(self, row: Row, ids: Tensor, learn: Tensor) -> tuple[Tensor, Lesson]:
        self._grads = {}
        found = super().read_segment(row, ids, learn)
        for writer in self.writers:
            if writer.learns:
                self._take(writer, row)
        return found

    def _take(self, writer: DeltaWriter, row: Row) -> None:
        """Add the gradient of a segment's losses by what one level has."""
        index, state = writer.index, row.levels[writer.index]
        start, rates = self.begin.starts[index], self.total.log_rates[index]
        for slot, g in writer.by_slot(self._grads).items():
            if writer.sparse is not None:
                sparse = writer.sparse.delta(state, slot)
                if sparse is not None:
                    rates[slot] += _inner(sparse.place.rows(g, sparse.units), sparse.rows)
                continue
            share = self.shares.levels[index][slot]
            kept = g * share if isinstance(share, float) else g * share.to(g.dtype)
            if slot in state.deltas:
                rates[slot] += _inner(g, state.deltas[slot])
            if slot in start:
                rates[slot] -= _inner(kept, start[slot])
            if slot in self.begin.learned[index]:
                self.total.add_start(index, slot, kept)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩, 0-D float64 on the CPU."""
    return (a * b).sum(dtype=torch.float64).cpu()


def first_order(reader: Reader, begin: Beginning, ids: Tensor) -> MetaGradient:
    """The first-order gradient of the mean loss of ids [T], read as `Learner.observe` reads them.

    Args:
        reader: reader whose writers have the rates of `begin`.
        begin: rates and starts.
        ids: [T] on the model's device, at least two.
    """
    meta = MetaReader(reader, begin)
    losses = read_whole(meta, begin, ids)
    count = len(ids) - 1
    for own in meta.total.starts:
        own.update({slot: g / count for slot, g in own.items()})
    for own in meta.total.log_rates:
        own.update({slot: g / count for slot, g in own.items()})
    meta.total.loss = float(losses[1:].mean())
    return meta.total


def read_whole(reader: Reader, begin: Beginning, ids: Tensor) -> Tensor:
    """Next-token losses [T] of ids [T] that levels learn from as they read, from these starts."""
    row = Row.new(begin.states(reader.writers), ids.device)
    learn, losses = torch.ones(len(ids), dtype=torch.bool, device="cpu"), []
    for piece, ends in reader.plan.pieces(0, len(ids)):
        if ends:
            found, writes = study(reader, row, ids[piece], learn[piece], 0)
            if isinstance(reader, MetaReader):
                reader.shares.follow(reader.writers, writes)
        else:  # the text ends before the segment does
            found, _ = reader.read_segment(row, ids[piece], learn[piece])
        losses.append(found)
    return torch.cat(losses)
