"""One segment studied: read, learned from at boundaries, and whatever else levels do there."""

from __future__ import annotations

from torch import Tensor

from nested_learning.continual.again import reread
from nested_learning.continual.deltas import Row
from nested_learning.continual.distil import distil
from nested_learning.continual.passage import Passage
from nested_learning.continual.reader import Reader
from nested_learning.continual.writing import Write, learn_from


def score_ahead(reader: Reader, row: Row, ids: Tensor, learn: Tensor) -> Tensor:
    """Next-token losses [n] of tokens inside a segment that has not ended; see `Reader.score`."""
    losses = reader.score(row, ids, learn)
    _keep(reader, row, ids, learn)
    return losses


def study(reader: Reader, row: Row, ids: Tensor, learn: Tensor, row_index: int) -> tuple[Tensor, list[Write]]:
    """Read the segment that ends with `ids`, and let every level learn what it has to learn there.

    Args:
        reader: the reader of the row.
        row: the row, which moves on by the n tokens.
        ids: [n].
        learn: bool [n] on the CPU, whether levels learn to predict each of `ids`.
        row_index: index of the row, for the reports.

    Returns:
        next-token losses [n] (nats) of `ids`, and the boundaries passed: faster levels first, then the
        re-readings.
    """
    losses, lesson = reader.read_segment(row, ids, learn)
    _keep(reader, row, ids, learn)
    if lesson.is_finite and reader.plan.window_ends(len(row.tokens), row.position):
        distil(reader, row)
        row.answers = None
    writes = learn_from(reader.writers, row, lesson, row_index)
    for write in list(writes):
        writer, state = reader.writers[write.level], row.levels[write.level]
        if writer.level.reread and write.outcome == "written":
            writes += reread(reader, writer, row, row_index)
        if state.read is not None:
            state.read = state.read.last(reader.plan.overlap)
    if not lesson.is_finite:
        row.clear_context()  # its keys and values may be NaN as well
    return losses, writes


def _keep(reader: Reader, row: Row, ids: Tensor, learn: Tensor) -> None:
    """Keep the tokens just read for the levels that will read them again."""
    for writer, state in zip(reader.writers, row.levels, strict=True):
        if writer.level.reread:
            kept = Passage(ids, learn) if state.read is None else state.read.joined(ids, learn)
            state.read = kept
