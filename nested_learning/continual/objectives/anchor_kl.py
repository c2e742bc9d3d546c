"""The pull of background text: levels stay near the base model's predictions on it.

At the boundary of a level with `Level.anchor_kl` = μ, a piece of the background text is read by the base
model and with the deltas of all levels, each time from an empty context, and

    G ← G + μ ∇_W Σ_t KL(p_t ‖ q_t),

where p_t is what the base model predicts for token t from those before it in the piece, over the whole
vocabulary, and q_t what the deltas make of it, as they are before any level writes at this boundary. A piece
has as many tokens as the level's chunk, or as fit a window, so that at μ = 1 as many tokens pull as push. The
pieces come in turn: the n-th boundary of the level reads the n-th piece, and after the last the first again;
so it depends on the position in the text alone, and nothing of it needs to be saved but which text it was.

The pull is clipped together with the chunk's own sum, is no part of what a slower level sums up, and is left
out where the chunk has nothing to learn, is gated or is dropped. Pieces are read in passes of at most
`segment` tokens. So for each token read it costs the level a forward and backward pass, and a forward pass of
the base model, once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.lesson import Lesson
from nested_learning.continual.objectives.again import read_again
from nested_learning.continual.reader import Reader, gradients
from nested_learning.continual.writing import DeltaWriter, accumulate
from nested_learning.memory.state import Weights


def pulls(reader: Reader, row: Row, lesson: Lesson, taught: Mapping[int, Weights]) -> dict[int, Weights]:
    """Gradients by slot that pull at the levels with a boundary at the row's position, by level.

    Args:
        reader: the reader of the row.
        row: the row, after a segment.
        lesson: what the segment taught.
        taught: what a closing window taught; see `distil`.
    """
    background, found = reader.anchors.background, {}
    for writer, state in zip(reader.writers, row.levels, strict=True):
        size = writer.level.chunk_size
        if background is None or not writer.level.anchor_kl or row.position % size:
            continue
        learned = state.pairs or lesson.inside.count or lesson.crossing.count
        if learned or state.distilled or taught.get(writer.index):
            piece = background.piece(min(size, reader.plan.window), row.position // size - 1)
            found[writer.index] = _pull(reader, writer, row, piece)
    return found


def _pull(reader: Reader, writer: DeltaWriter, row: Row, piece: Tensor) -> Weights:
    grads: Weights = {}
    before = Context()
    with reader.learning(row) as leaves:
        own = {key: leaves[key] for key in writer.keys.values()}

        def read(a: int, b: int, context: Context) -> Context:
            nonlocal before
            with torch.no_grad(), reader.workspace.bare():
                base, before = reader.predict(piece[a:b], before)
            with torch.enable_grad():
                logits, context = reader.predict(piece[a:b], context)
                log_q, log_p = logits.log_softmax(-1), base.log_softmax(-1)
                divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
                accumulate(grads, gradients(divergence, own), writer.level.anchor_kl)
            return context

        read_again(reader, piece, 0, read)
    return writer.by_slot(grads)
