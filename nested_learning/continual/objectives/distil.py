"""Distillation at the boundary of a window: levels learn to answer without the context as with it.

A window closes at the end of a segment after which the next segment does not fit any more. What was said in
it is then out of the model's sight, but for the `overlap` tokens that the new window begins with. A level
with `Level.distill` = λ takes over how the context made the model answer:

    G ← G + λ ∇_W Σ_t KL(p_t ‖ q_t)

over the tokens t of the second half of the window whose prediction is learned (`learn_mask`): those of the
segments that began at index window // 2 of it or later. p_t, the teacher, is what the model predicted for
token t when it read it as part of the text: with the whole window before it, with the deltas in force then.
q_t, the student, is what it predicts now, where the window closes, at the deltas with which the last segment
was read (before the writes at this boundary), as if a new window had begun in the middle: `overlap` tokens
before the second half are read again without gradient, and the second half after them in passes of at most
`segment` tokens, each with the keys and values of those before and no gradient into them. The first half is
not read again; it counts by what it changed in the predictions of the second.

The gradient goes into the level's next write: the one at this very token, if the level has its boundary here,
else the next. It is clipped together with the chunk's own sum, does not count in the chunk's mean loss, is
discarded where the chunk is gated or dropped, and is no part of what a slower level sums up: each level has
its own λ.

Of the teacher the `top_k` largest log-probabilities of a token are kept, and that of all other tokens
together. KL is taken over these k + 1 outcomes. (To renormalise over the top k instead would leave what the
student gives to other tokens without a gradient. With the rest as one outcome, KL is a lower bound of that
over the vocabulary, and equals it for k = vocabulary − 1.)

It costs a forward and backward pass of half of the tokens read, a forward pass of the overlap per window, and
k + 1 log-probabilities and k ids for each token of the second half; between a closing and the level's next
write, a second set of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.level import Level
from nested_learning.continual.objectives.again import read_again
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.reader import Reader, gradients
from nested_learning.continual.writing import accumulate
from nested_learning.memory.state import Weights
from nested_learning.optimizers.checks import COUNT


def distil(reader: Reader, row: Row) -> dict[int, Weights]:
    """Gradients by slot, by level, that a closing window teaches, without λ.

    Args:
        reader: the reader of the row.
        row: the row, at the end of its window's last segment; it is left alone.
    """
    writers = [writer for writer in reader.writers if writer.level.distill]
    if not writers or row.answers is None:
        return {}
    teacher, overlap = row.answers, reader.plan.overlap
    # `tokens` begins with the overlap, whose last token predicts the first one of the second half.
    tokens = row.tokens[len(row.tokens) - len(teacher) - overlap :]
    learn = row.learn[len(row.learn) - len(tokens) :]
    grads: Weights = {}
    with reader.learning(row) as leaves:
        own = {key: leaves[key] for writer in writers for key in writer.keys.values()}

        def read(a: int, b: int, context: Context) -> Context:
            chosen = learn[a + 1 : b + 1].nonzero()[:, 0].to(tokens.device)
            with torch.set_grad_enabled(len(chosen) > 0):
                logits, context = reader.predict(tokens[a:b], context)
                if len(chosen):
                    taught = teacher[a + 1 - overlap : b + 1 - overlap][chosen]
                    accumulate(grads, gradients(taught.divergence(logits[chosen]).sum(), own))
            return context

        read_again(reader, tokens, overlap - 1, read)
    return {w.index: w.by_slot(grads) for w in writers}


def plan_distillation(plan: ReadingPlan, levels: Sequence[Level], top_k: int | None) -> ReadingPlan:
    """The plan of levels of which some may distil, with `top_k` predictions kept; None for 64.

    Raises:
        ValueError: `top_k` is no count, or no level distils; or the second half of a window is too short for
            a segment to begin in it, or begins within the overlap.
    """
    if top_k is not None:
        COUNT.check("distill_top_k", top_k)
    if not any(level.distill for level in levels):
        if top_k is not None:
            raise ValueError(
                f"distill_top_k is {top_k}, but no level distils: give one a `distill`, or leave it out"
            )
        return plan
    if 2 * plan.segment > plan.window - plan.half or plan.overlap >= plan.half:
        raise ValueError(
            "a level distils, which is done in the second half of a window: the window must hold four "
            f"segments, and its overlap must be less than half of it, got window={plan.window}, "
            f"segment={plan.segment}, overlap={plan.overlap}; set a longer window, or a shorter segment or "
            "overlap"
        )
    return replace(plan, distill_top_k=64 if top_k is None else top_k)
