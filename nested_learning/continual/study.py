"""One segment studied: read, learned from at boundaries, and whatever else levels do there."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from nested_learning.continual.deltas import Row
from nested_learning.continual.objectives.again import reread
from nested_learning.continual.objectives.anchor_kl import pulls
from nested_learning.continual.objectives.distil import distil
from nested_learning.continual.objectives.passage import KeptTokens
from nested_learning.continual.reader import Reader
from nested_learning.continual.replaying.replayer import NamedText
from nested_learning.continual.writing import Write, accumulate, learn_from
from nested_learning.memory.state import Weights


def score_ahead(
    reader: Reader, row: Row, ids: Tensor, learn: Tensor, text: NamedText | None = None
) -> Tensor:
    """Next-token losses [n] of tokens inside a segment that has not ended; see `Reader.score`."""
    losses = reader.score(row, ids, learn)
    _keep(reader, row, ids, learn)
    if text is not None:
        text.name(row, len(ids))
    return losses


def study(
    reader: Reader, row: Row, ids: Tensor, learn: Tensor, row_index: int, text: NamedText | None = None
) -> tuple[Tensor, list[Write]]:
    """Read the segment that ends with `ids`, and let every level learn what it has to learn there.

    Args:
        reader: the reader of the row.
        row: the row, which moves on by the n tokens.
        ids: [n].
        learn: bool [n] on the CPU, whether levels learn to predict each of `ids`.
        row_index: index of the row, for the reports.
        text: names of the ids, and what keeps and replays text; None where nothing is kept.

    Returns:
        next-token losses [n] (nats) of `ids`, and the boundaries passed: faster levels first, then the
        re-readings.
    """
    # What needs the model comes first and is done on a copy: where it fails, the row is as it was before.
    # So it is where a re-reading fails, which needs what was written.
    before = row.share() if _reads_again(reader, row.position + len(ids)) else None
    moved = dataclasses.replace(row)
    losses, lesson = reader.read_segment(moved, ids, learn)
    taught: dict[int, Weights] = {}
    if lesson.is_finite and reader.plan.window_ends(len(moved.tokens), moved.position):
        taught, moved.answers = distil(reader, moved), None
    pull = pulls(reader, moved, lesson, taught)
    replayed = text.replayer.read(moved, lesson) if text else {}
    vars(row).update(vars(moved))
    _keep(reader, row, ids, learn)
    for index, grads in taught.items():
        row.levels[index].own()
        accumulate(row.levels[index].distilled, grads, reader.writers[index].level.distill)
    writes = learn_from(reader.writers, row, lesson, row_index, pull, replayed)
    if text:
        text.name(row, len(ids))
        text.replayer.keep(row, lesson, writes, replayed)
    try:
        for write in list(writes):
            if write.outcome == "written":
                writes += reread(reader, reader.writers[write.level], row, row_index)
    except BaseException:
        if before is not None:
            vars(row).update(vars(before))
        raise
    _let_go(reader, row)
    if not lesson.is_finite:
        row.clear_context()  # its keys and values may be NaN as well
    return losses, writes


def _reads_again(reader: Reader, position: int) -> bool:
    """Whether a level whose chunk ends at a position goes over it again."""
    levels = (writer.level for writer in reader.writers)
    return any(level.reread and position % level.chunk_size == 0 for level in levels)


def _keep(reader: Reader, row: Row, ids: Tensor, learn: Tensor) -> None:
    """Keep the tokens just read for the levels that will read them again."""
    for writer, state in zip(reader.writers, row.levels, strict=True):
        if writer.level.reread:
            before = state.read or KeptTokens(ids[:0], learn[:0])
            state.read = before.joined(ids, learn)  # in tensors of its own


def _let_go(reader: Reader, row: Row) -> None:
    """Keep no more of a chunk that has ended than the next one's re-reading begins with."""
    for writer, state in zip(reader.writers, row.levels, strict=True):
        if state.read is not None and row.position % writer.level.chunk_size == 0:
            state.read = state.read.last(reader.plan.overlap)
