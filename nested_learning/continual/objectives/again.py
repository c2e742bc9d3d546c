"""Re-reading: a level goes over the chunk that it has just learned from, at the weights it has now.

A level with `Level.reread` = r writes at its boundary as every level does. If that write was made, the chunk
is read again: all its tokens, with the deltas of all levels as they are after every level has written at this
boundary. G is the gradient of the next-token loss over the level's own pairs (those wholly inside the chunk
whose second token is learned), and the level writes

    Δ ← Δ − lr · rule(clip(G)),

alone; then once more at the weights that this makes, r times in all. Faster levels re-read first. The gate,
the decay and the taking over act once for a chunk, at its first write; the rule's state moves on with each
write. A re-reading whose loss or gradient is NaN or infinite is dropped, and those after it are left out.

The chunk is read as at the start of a new window: with the `overlap` tokens before it as context, which are
read with the weights of now and without gradient. It is read in passes of at most `segment` tokens, each with
the keys and values of those before and no gradient into them; where a pass does not fit the window, another
window begins with the `overlap` tokens before the pass. (The levels' boundaries inside the chunk are no
pauses: nothing is written between them.) So a re-reading costs a forward and backward pass of the chunk's
tokens and a forward pass of the overlap, and keeps the tokens of the running chunk and of the overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.objectives.passage import KeptTokens
from nested_learning.continual.reader import Reader, gradients, learned_sum
from nested_learning.continual.writing import DeltaWriter, Write, accumulate
from nested_learning.memory.state import Weights


def read_again(
    reader: Reader, tokens: Tensor, first: int, read: Callable[[int, int, Context], Context]
) -> None:
    """Go over tokens [n] in passes as the module describes, in whatever weights are in force.

    Args:
        reader: the reader whose plan says how long passes and windows are.
        tokens: ids [n], of which the first `first` are context alone.
        first: index of the first token that a pass reads.
        read: takes one pass: reads tokens a to b − 1, which predict tokens a + 1 to b, in a context; returns
            the context after that. The last token is predicted, and not read.
    """
    plan, begins, context = reader.plan, 0, reader.context_of(tokens[:first])
    for a in range(first, len(tokens) - 1, plan.segment):
        b = min(a + plan.segment, len(tokens) - 1)
        if b - begins > plan.window:
            begins = max(a - plan.overlap, 0)
            context = reader.context_of(tokens[begins:a])
        context = read(a, b, context)


def reread(reader: Reader, writer: DeltaWriter, row: Row, row_index: int) -> list[Write]:
    """Let a level that has just written at the row's position go over its chunk again.

    Returns:
        its further writes.
    """
    writes: list[Write] = []
    state, passage = row.levels[writer.index], row.levels[writer.index].read
    if passage is None:
        return writes
    pairs = min(len(passage), writer.level.chunk_size) - 1
    learned = int(passage.learn[len(passage) - pairs :].sum())
    if not learned:  # it was written for what a closing window taught
        return writes
    for times in range(1, writer.level.reread + 1):
        sums, loss = _chunk_gradient(reader, writer, row, passage)
        state.sums, state.loss, state.pairs = sums, loss, learned
        outcome = writer.write(state, again=True)
        writes.append(Write(writer.index, row_index, row.position, *outcome, reread=times))
        if outcome[0] != "written":
            break
        row.mark_changed()
    return writes


def _chunk_gradient(
    reader: Reader, writer: DeltaWriter, row: Row, passage: KeptTokens
) -> tuple[Weights, float]:
    """Gradient by slot, and sum of the losses, of the level's pairs in the chunk that ends the passage."""
    grads: Weights = {}
    parts: list[Tensor] = []
    with reader.learning(row) as leaves:
        own = {key: leaves[key] for key in writer.keys.values()}

        def read(a: int, b: int, context: Context) -> Context:
            learn = passage.learn[a + 1 : b + 1]
            with torch.set_grad_enabled(bool(learn.any())):
                losses, context = reader.losses(passage.tokens[a : b + 1], context)
                total = learned_sum(losses, learn)
                if total.requires_grad:
                    accumulate(grads, gradients(total, own))
            parts.append(total.detach())
            return context

        first = max(len(passage) - writer.level.chunk_size, 0)
        read_again(reader, passage.tokens, first, read)
    loss = float(torch.stack(parts).sum()) if parts else 0.0
    return writer.by_slot(grads), loss
