"""How documents in a row are read: which of them together, in which order, and where the results belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.document_rows import DocumentRows

# Tokens whose reading costs about as much as one call more. Source that have ended are read on, to no effect,
# until this much would be spared by a call without them (measured, docs/log.md).
CALL = 256
# Of the longest document, the length of the shortest that is read in one batch with it, padded.
ALIKE = 0.75


class Source(NamedTuple):
    """Source of the state after an earlier step; `step` −1 is the state that the call was given."""

    step: int
    rows: Tensor | slice  # [n] int64; a slice where they are the first ones


class ReadingStep(NamedTuple):
    """Documents that are read together, and which of their tokens.

    Attributes:
        columns: [n, L] int64, places of the tokens in the flat inputs, all rows' columns and then the prefix.
        real: [n, L] bool, False = no token, whose place is that of any token; None where that need not be
            known, since neither output nor state of such columns is asked for.
        before: where the states come from, in the order of the rows; empty for the initial state.
        aligned: every document stands at a boundary, a multiple of the plan's step.
        first: tokens of every document before these, where the documents are aligned and whole chunks of them
            are read; else None. Aligned without `first` are ends of documents, less than a chunk of each, and
            rows without a document, of nothing but the prefix.
    """

    columns: Tensor
    real: Tensor | None
    before: tuple[Source, ...]
    aligned: bool
    first: int | None


class Plan(NamedTuple):
    """Steps in their order, and where their results belong.

    Attributes:
        columns: [outputs] int64, those of all steps, one after another.
        place: [B · T] int64, where each token's output stands among those of all steps, one after another.
        last: where each row's state after its last document comes from, in the order of `order`; empty where
            no states are kept.
        order: [B] int64, the place of row b among those.
    """

    steps: tuple[ReadingStep, ...]
    columns: Tensor
    place: Tensor
    last: tuple[Source, ...]
    order: Tensor


class DocumentBatch(NamedTuple):
    """Documents of about the same length.

    Attributes:
        columns: [n, L] int64, as in `ReadingStep`.
        real: [n, L] bool, False where a document has ended.
        rows: [n] int64, the row of each document.
    """

    columns: Tensor
    real: Tensor
    rows: Tensor


class DocumentBatches(NamedTuple):
    """All documents whole.

    Attributes:
        new: documents that begin, in batches of lengths of which none is below `ALIKE` times the longest.
        going_on: those that go on with a state.
        columns, place: as in `Plan`, of `new` and then of `going_on`.
    """

    new: tuple[DocumentBatch, ...]
    going_on: DocumentBatch | None
    columns: Tensor
    place: Tensor


def plan_batches(documents: DocumentRows, given: bool) -> DocumentBatches:
    """Batches of documents of about the same length."""
    goes_on = documents.goes_on(given)
    order = documents.lengths.argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    for document in order[~goes_on[order]].tolist():
        if not groups or documents.lengths[document] < ALIKE * documents.lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(document)
    old = goes_on.nonzero().squeeze(1)
    place = torch.zeros(documents.shape[0] * documents.shape[1], dtype=torch.long)
    outputs, batches = 0, []
    for group in [*(torch.tensor(group) for group in groups), *([old] if len(old) else [])]:
        lengths = documents.lengths[group].unsqueeze(1)
        inside = torch.arange(int(lengths.max())).expand(len(group), -1)
        real = inside < lengths
        inside = documents.starts[group].unsqueeze(1) + torch.minimum(inside, lengths - 1)
        columns = documents.tokens[inside]
        place[columns[real]] = outputs + real.flatten().nonzero().squeeze(1)
        outputs += real.numel()
        parts = (columns, real, documents.rows[group])
        batches.append(DocumentBatch(*(part.to(documents.device) for part in parts)))
    columns = torch.cat([batch.columns.flatten() for batch in batches])
    going_on = batches.pop() if len(old) else None
    return DocumentBatches(tuple(batches), going_on, columns, place.to(documents.device))


class Planner:
    """Lays out the steps of a `Plan`; everything on the CPU until the end."""

    def __init__(self, documents: DocumentRows, step: int, given: bool, prefix: int) -> None:
        self.documents, self.size, self.given, self.prefix = documents, step, given, prefix
        goes_on = documents.goes_on(given)
        self.lengths = documents.lengths + torch.where(goes_on, 0, prefix)
        self.prefixes = torch.where(goes_on, 0, prefix)
        self.wanted = documents.last() if documents.keep else torch.zeros_like(goes_on)
        self.goes_on = goes_on
        self.steps: list[ReadingStep] = []
        self.after: dict[int, tuple[int, int]] = {}  # document -> step and row of the state at its end
        self.place = torch.zeros(documents.shape[0] * documents.shape[1], dtype=torch.long)
        self.outputs = 0

    def plan(self) -> Plan:
        new, old = (~self.goes_on).nonzero().squeeze(1), self.goes_on.nonzero().squeeze(1)
        self._go_on(old)
        self._begin(new)
        last, order = self._last()
        device = self.documents.device
        columns = torch.cat([step.columns.flatten() for step in self.steps])
        return Plan(tuple(self.steps), columns, self.place.to(device), last, order)

    def _go_on(self, documents: Tensor) -> None:
        """Documents that go on with a state, at whatever place of a chunk they stand: like padded rows."""
        documents = documents[self.lengths[documents].argsort(descending=True, stable=True)]
        if len(documents) == 0:
            return
        ends = self.lengths[documents].tolist()
        before, start = Source(-1, self.documents.rows[documents]), 0
        for stop in _cuts(ends, []):
            count = sum(end > start for end in ends)
            now = self._step(documents[:count], start, stop, (before,), False, True)
            self.after.update({int(documents[r]): (now, r) for r in range(count) if ends[r] <= stop})
            left, start = sum(end > stop for end in ends), stop
            before = Source(now, slice(0, left))

    def _begin(self, documents: Tensor) -> None:
        """Documents that begin: whole chunks first; those whose state is wanted read their last, unfinished
        chunk with `real`, the others to the end of the chunk."""
        size = self.size
        wanted = self.wanted[documents]
        whole = torch.where(wanted, self.lengths[documents] // size, -(-self.lengths[documents] // size))
        order = whole.argsort(descending=True, stable=True)
        documents, whole, wanted = documents[order], whole[order] * size, wanted[order]
        ends = whole.tolist()
        forced = whole[wanted].tolist()
        kept: dict[int, tuple[int, int]] = {}  # document -> step and row of the state at its last boundary
        start, now = 0, -1
        for stop in _cuts([end for end in ends if end], forced):
            count = sum(end > start for end in ends)
            before = (Source(now, slice(0, count)),) if start else ()
            now = self._step(documents[:count], start, stop, before, True, False)
            for row in range(count):
                if bool(wanted[row]) and ends[row] == stop:
                    kept[int(documents[row])] = (now, row)
            start = stop
        self._finish(documents[wanted], kept)

    def _finish(self, documents: Tensor, kept: dict[int, tuple[int, int]]) -> None:
        """The unfinished last chunks of documents whose state is wanted."""
        chosen = documents.tolist()
        whole = {d: int(self.lengths[d]) // self.size * self.size for d in chosen}
        self.after.update({d: kept[d] for d in chosen if whole[d] == int(self.lengths[d])})
        for fresh in (True, False):
            rest = [d for d in chosen if d not in self.after and (d not in kept) == fresh]
            if not rest:
                continue
            # In the order of the steps that their states come from, so that each is looked up once.
            rest.sort(key=lambda d: kept.get(d, (0, 0)))
            before = () if fresh else _sources([kept[d] for d in rest])
            index = torch.tensor(rest)
            starts = torch.tensor([whole[d] for d in rest])
            length = int((self.lengths[index] - starts).max())
            now = self._step(index, starts, length, before, True, True)
            self.after.update({d: (now, row) for row, d in enumerate(rest)})

    def _last(self) -> tuple[tuple[Source, ...], Tensor]:
        """Where the state after each batch row's last document comes from."""
        if not self.documents.keep:
            return (), torch.zeros(0, dtype=torch.long)
        B = self.documents.shape[0]
        found: dict[int, tuple[int, int]] = {}
        for document, place in self.after.items():
            found[int(self.documents.rows[document])] = place
        empty = [b for b in range(B) if b not in found]
        if empty and self.given:
            found.update({b: (-1, b) for b in empty})
        elif empty:  # rows of nothing but padding: the initial state, after the prefix if there is one
            P = self.prefix
            columns = len(self.place) + torch.arange(P) if P else torch.zeros(1, dtype=torch.long)
            index = columns.repeat(len(empty), 1)
            real = None if P else self._to_device(torch.zeros_like(index, dtype=torch.bool))
            self.steps.append(ReadingStep(self._to_device(index), real, (), True, None))
            self.outputs += index.numel()
            found.update({b: (len(self.steps) - 1, i) for i, b in enumerate(empty)})
        rows = sorted(range(B), key=lambda b: found[b])
        order = torch.empty(B, dtype=torch.long)
        order[torch.tensor(rows, dtype=torch.long)] = torch.arange(B)
        sources = _sources([found[b] for b in rows])
        return self._sources_to_device(sources), self._to_device(order)

    def _step(
        self,
        documents: Tensor,
        start: int | Tensor,
        stop: int,
        before: tuple[Source, ...],
        aligned: bool,
        padded: bool,
    ) -> int:
        """Add a step for the tokens from `start` to `stop` of these documents and give its number; with a
        start for each document, `stop` is how many."""
        length = stop if isinstance(start, Tensor) else stop - start
        starts = start if isinstance(start, Tensor) else torch.full((len(documents),), start)
        inside = starts.unsqueeze(1) + torch.arange(length)  # [n, L] token of the document
        lengths = self.lengths[documents].unsqueeze(1)
        real = inside < lengths
        inside = torch.minimum(inside, lengths - 1)  # columns without a token repeat the document's last one
        token = inside - self.prefixes[documents].unsqueeze(1)
        own = self.documents.tokens[(self.documents.starts[documents].unsqueeze(1) + token).clamp_min(0)]
        index = torch.where(token < 0, len(self.place) + inside, own)
        held = real & (token >= 0)
        self.place[index[held]] = self.outputs + held.flatten().nonzero().squeeze(1)
        self.outputs += real.numel()
        flags = self._to_device(real) if padded and not bool(real.all()) else None
        first = None if isinstance(start, Tensor) or not aligned else start
        sources = self._sources_to_device(before)
        self.steps.append(ReadingStep(self._to_device(index), flags, sources, aligned, first))
        return len(self.steps) - 1

    def _to_device(self, t: Tensor) -> Tensor:
        return t.to(self.documents.device)

    def _sources_to_device(self, sources: Sequence[Source]) -> tuple[Source, ...]:
        return tuple(
            s if isinstance(s.rows, slice) else Source(s.step, self._to_device(s.rows)) for s in sources
        )


def _cuts(ends: Sequence[int], forced: Sequence[int]) -> list[int]:
    """Columns at which the batch is cut, the last of them max(ends).

    Args:
        ends: column after each document's last.
        forced: columns that are cuts in any case.
    """
    values = sorted(set(ends))
    must = set(forced)
    cuts, ended, wasted = [], 0, 0
    for value, following in zip(values, [*values[1:], 0][: len(values)], strict=True):
        ended += ends.count(value)
        wasted += ended * (following - value)
        if not following or value in must or wasted > CALL:
            cuts.append(value)
            ended = wasted = 0
    return cuts


def _sources(places: Sequence[tuple[int, int]]) -> tuple[Source, ...]:
    """Places (step, row), sorted by step, as one entry per step."""
    steps = sorted({step for step, _ in places})
    return tuple(Source(s, torch.tensor([row for step, row in places if step == s])) for s in steps)
