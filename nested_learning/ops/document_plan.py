"""How documents in a row are read: which of them together, in which order, and where the results belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.document_rows import DocumentRows
from nested_learning.ops.places import Places

# Tokens whose reading costs about as much as one call more. Rows that have ended are read on, to no effect,
# until this much would be spared by a call without them (measured, docs/log.md).
CALL = 256
# Of the longest document, the length of the shortest that is read in one batch with it, padded.
ALIKE = 0.75


class Source(NamedTuple):
    """Rows of the state after an earlier step; `step` −1 is the state that the call was given."""

    step: int
    rows: Tensor | slice  # [n] int64; a slice where they are the first ones


class ReadingStep(NamedTuple):
    """Documents that are read together, and which of their tokens.

    Attributes:
        shape: (n, L), documents and columns.
        real: [n, L] bool, False = no token, but zeros; None where that need not be known, since neither
            output nor state of such columns is asked for.
        before: where the states come from, in the order of the rows; empty for the initial state.
        aligned: every document stands at a boundary, a multiple of the plan's step.
        first: tokens of every document before these, where the documents are aligned and whole chunks of them
            are read; else None. Aligned without `first` are ends of documents, less than a chunk of each, and
            rows without a document, of nothing but the prefix.
    """

    shape: tuple[int, int]
    real: Tensor | None
    before: tuple[Source, ...]
    aligned: bool
    first: int | None


class Layout(NamedTuple):
    """Tokens of all rows, and the K columns of several batches of documents [n, L], one after another.

    Attributes:
        shapes: (n, L) of each batch.
        tokens: of each column the token that stands there, none for those without one and for a prefix.
        columns: of each token the column that it stands in, none for padding.
        prefix: the columns [n] int64 of prefixes, and which token of the prefix stands in each; None without.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: Places
    columns: Places
    prefix: tuple[Tensor, Tensor] | None


class Plan(NamedTuple):
    """Steps in their order, and where their results belong.

    Attributes:
        layout: where the tokens stand in the steps.
        last: where each row's state after its last document comes from, in the order of `order`; empty where
            no states are kept.
        order: [B] int64, the place of row b among those.
    """

    steps: tuple[ReadingStep, ...]
    layout: Layout
    last: tuple[Source, ...]
    order: Tensor


class DocumentBatch(NamedTuple):
    """Documents of about the same length.

    Attributes:
        shape: (n, L), documents and columns.
        real: [n, L] bool, False where a document has ended.
        rows: [n] int64, the row of each document.
    """

    shape: tuple[int, int]
    real: Tensor
    rows: Tensor


def plan_batches(
    documents: DocumentRows, given: bool
) -> tuple[tuple[DocumentBatch, ...], DocumentBatch | None, Layout]:
    """Results of `Documents.batches`."""
    goes_on = documents.goes_on(given)
    order = documents.lengths.argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    for document in order[~goes_on[order]].tolist():
        if not groups or documents.lengths[document] < ALIKE * documents.lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(document)
    old = goes_on.nonzero().squeeze(1)
    columns, batches = [], []
    for group in [*(torch.tensor(group, device="cpu") for group in groups), *([old] if len(old) else [])]:
        lengths = documents.lengths[group].unsqueeze(1)
        inside = torch.arange(int(lengths.max()), device="cpu").expand(len(group), -1)
        real = inside < lengths
        inside = documents.starts[group].unsqueeze(1) + torch.minimum(inside, lengths - 1)
        columns.append(torch.where(real, documents.tokens[inside], -1))
        parts = (real.to(documents.device), documents.rows[group].to(documents.device))
        batches.append(DocumentBatch((len(group), real.shape[1]), *parts))
    layout = lay_out(documents, columns)
    last = batches.pop() if len(old) else None
    return tuple(batches), last, layout


def lay_out(documents: DocumentRows, columns: Sequence[Tensor]) -> Layout:
    """The layout of batches.

    Args:
        columns: of each batch [n, L] int64 on the CPU, the token of each column; −1 none, −2 − p token p of
            the prefix.
    """
    flat, device = torch.cat([c.flatten() for c in columns]), documents.device
    filled = (flat >= 0).nonzero().squeeze(1)
    place = torch.full((documents.shape[0] * documents.shape[1],), -1, device="cpu")
    place[flat[filled]] = filled
    prefixed = (flat < -1).nonzero().squeeze(1)
    prefix = prefixed.to(device), (-2 - flat[prefixed]).to(device)
    return Layout(
        tuple((c.shape[0], c.shape[1]) for c in columns),
        Places.of(flat, device),
        Places.of(place, device),
        prefix if len(prefixed) else None,
    )


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
        self.columns: list[Tensor] = []  # of each step [n, L], as in `lay_out`

    def plan(self) -> Plan:
        new, old = (~self.goes_on).nonzero().squeeze(1), self.goes_on.nonzero().squeeze(1)
        self._go_on(old)
        self._begin(new)
        last, order = self._last()
        return Plan(tuple(self.steps), lay_out(self.documents, self.columns), last, order)

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
            index = torch.tensor(rest, device="cpu")
            starts = torch.tensor([whole[d] for d in rest], device="cpu")
            length = int((self.lengths[index] - starts).max())
            now = self._step(index, starts, length, before, True, True)
            self.after.update({d: (now, row) for row, d in enumerate(rest)})

    def _last(self) -> tuple[tuple[Source, ...], Tensor]:
        """Where the state after each batch row's last document comes from."""
        if not self.documents.keep:
            return (), torch.zeros(0, dtype=torch.long, device="cpu")
        B = self.documents.shape[0]
        found: dict[int, tuple[int, int]] = {}
        for document, place in self.after.items():
            found[int(self.documents.rows[document])] = place
        empty = [b for b in range(B) if b not in found]
        if empty and self.given:
            found.update({b: (-1, b) for b in empty})
        elif empty:  # rows of nothing but padding: the initial state, after the prefix if there is one
            P = self.prefix
            one = -2 - torch.arange(P, device="cpu") if P else torch.full((1,), -1, device="cpu")
            columns = one.repeat(len(empty), 1)
            real = None if P else self._to_device(torch.zeros_like(columns, dtype=torch.bool))
            self._add(columns, real, (), True, None)
            found.update({b: (len(self.steps) - 1, i) for i, b in enumerate(empty)})
        rows = sorted(range(B), key=lambda b: found[b])
        order = torch.empty(B, dtype=torch.long, device="cpu")
        order[torch.tensor(rows, dtype=torch.long, device="cpu")] = torch.arange(B, device="cpu")
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
        starts = start if isinstance(start, Tensor) else torch.full((len(documents),), start, device="cpu")
        inside = starts.unsqueeze(1) + torch.arange(length, device="cpu")  # [n, L] token of the document
        lengths = self.lengths[documents].unsqueeze(1)
        real = inside < lengths
        token = inside - self.prefixes[documents].unsqueeze(1)
        index = self.documents.starts[documents].unsqueeze(1) + token
        own = self.documents.tokens[index.clamp(0, len(self.documents.tokens) - 1)]
        columns = torch.where(token < 0, -2 - inside, own).where(real, -1)
        flags = self._to_device(real) if padded and not bool(real.all()) else None
        first = None if isinstance(start, Tensor) or not aligned else start
        return self._add(columns, flags, self._sources_to_device(before), aligned, first)

    def _add(
        self,
        columns: Tensor,
        real: Tensor | None,
        before: tuple[Source, ...],
        aligned: bool,
        first: int | None,
    ) -> int:
        """Add a step and give its number; `columns` as in `lay_out`."""
        shape = columns.shape[0], columns.shape[1]
        self.columns.append(columns)
        self.steps.append(ReadingStep(shape, real, before, aligned, first))
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
    return tuple(
        Source(s, torch.tensor([row for step, row in places if step == s], device="cpu")) for s in steps
    )
