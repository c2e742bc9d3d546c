"""Documents in a row: several sequences end to end, read as rows of their own (spec section 8).

Longest first, and the batch shrinks as they end: work is the sum of the documents' chunks, and every engine
sees what it always sees, rows that begin at a boundary of all memories. Nothing of a document can reach
another one, as no two ever share a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.ops.rows import join_rows, select_rows

# Tokens whose reading costs about as much as one call more. Rows that have ended are read on, to no effect,
# until this much would be spared by a call without them (measured, docs/log.md).
CALL = 256
# Of the longest document, the length of the shortest that is read in one batch with it, padded.
ALIKE = 0.75

# From (inputs, state, real, aligned), and `first` where that is asked for, to (outputs, state).
Reader = Callable[..., tuple[Any, Any]]


class Rows(NamedTuple):
    """Rows of the state after an earlier step; `step` −1 is the state that the call was given."""

    step: int
    rows: Tensor | slice  # [n] int64; a slice where they are the first ones


class Step(NamedTuple):
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
    before: tuple[Rows, ...]
    aligned: bool
    first: int | None


class Plan(NamedTuple):
    """Steps in their order, and where their results belong.

    Attributes:
        place: [B · T] int64, where each token's output stands among those of all steps, one after another.
        last: where each row's state after its last document comes from, in the order of `order`; empty where
            no states are kept.
        order: [B] int64, the place of row b among those.
    """

    steps: tuple[Step, ...]
    place: Tensor
    last: tuple[Rows, ...]
    order: Tensor


class Batch(NamedTuple):
    """Documents of about the same length.

    Attributes:
        columns: [n, L] int64, as in `Step`.
        real: [n, L] bool, False where a document has ended.
        rows: [n] int64, the row of each document.
    """

    columns: Tensor
    real: Tensor
    rows: Tensor


class Documents:
    """Where the documents of a batch of rows begin. Waits for the device only when it is made.

    Args:
        begins: [B, T] bool, tokens that begin a document. A row's first real token that does not begin one
            goes on with the row's state, if there is one.
        real: [B, T] bool, False = padding, which belongs to no document; None: there is none.
        keep: whether the states after the rows' last documents are wanted.
        device: where the tokens are, if `begins` is not there.

    Attributes:
        padded: `real`.
        starts: [D] int64 on the CPU, for each document its first token among all real ones, row after row.
        lengths, rows: [D] int64 on the CPU, its number of tokens and its row.
    """

    def __init__(
        self,
        begins: Tensor,
        real: Tensor | None = None,
        keep: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.shape, self.padded, self.keep = begins.shape, real, keep
        self.device = device or begins.device
        B, T = begins.shape
        begins = begins.cpu().flatten()  # here the device is waited for
        if real is None:
            self.tokens = torch.arange(B * T)  # [N], places of the real tokens
        else:
            self.tokens = real.cpu().flatten().nonzero().squeeze(1)
            begins = begins[self.tokens]
        row = self.tokens // max(T, 1)
        first = torch.ones_like(begins)  # of its row
        first[1:] = row[1:] != row[:-1]
        self.starts = (begins | first).nonzero().squeeze(1)
        self.lengths = torch.diff(self.starts, append=self.starts.new_tensor([len(self.tokens)]))
        self.rows = row[self.starts]
        self._goes_on = ~begins[self.starts]
        self._plans: dict[tuple[int, bool, int], Plan] = {}
        self._batches: dict[bool, tuple[tuple[Batch, ...], Batch | None, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def segment(self, start: int, stop: int, keep: bool) -> Documents:
        """The same documents in the columns from `start` to `stop` alone.

        Args:
            keep: whether the states after them are wanted.
        """
        begins = self.tokens.new_zeros(self.shape[0] * self.shape[1], dtype=torch.bool)
        begins[self.tokens[self.starts[~self._goes_on]]] = True
        begins = begins.view(self.shape)[:, start:stop]
        padded = None if self.padded is None else self.padded[:, start:stop]
        return Documents(begins, padded, keep, self.device)

    def goes_on(self, given: bool) -> Tensor:
        """[D] bool on the CPU: which documents go on with their row's state, where one is `given`."""
        return self._goes_on if given else torch.zeros_like(self._goes_on)

    def last(self) -> Tensor:
        """[D] bool on the CPU: which documents are the last of their row."""
        last = torch.ones_like(self._goes_on)
        last[:-1] = self.rows[1:] != self.rows[:-1]
        return last

    def positions(self) -> Tensor:
        """[B, T] int64: the place of each token in its document, from 0 in this call; 0 for padding."""
        inside = torch.arange(len(self.tokens)) - self.starts.repeat_interleave(self.lengths)
        return self._to_rows(inside)

    def of_tokens(self, value: Tensor) -> Tensor:
        """[B, T]: of a value [D] on the CPU, that of each token's document; 0 or False for padding."""
        return self._to_rows(value.repeat_interleave(self.lengths))

    def _to_rows(self, value: Tensor) -> Tensor:
        """[B, T] on the device, of values [N] of all real tokens on the CPU."""
        flat = value.new_zeros(self.shape[0] * self.shape[1])
        flat[self.tokens] = value
        return flat.view(self.shape).to(self.device)

    def last_tokens(self, given: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of each row's last document.

        Returns:
            columns [B, L] int64 as in `Step`, which of them are `real` [B, L] bool, and, on the CPU, the rows
            [B] bool whose last document goes on with their state, those without a token among them.
        """
        B = self.shape[0]
        last = self.last()
        starts, lengths = torch.zeros(B, dtype=torch.long), torch.zeros(B, dtype=torch.long)
        goes_on = torch.full((B,), given)
        rows = self.rows[last]
        starts[rows], lengths[rows] = self.starts[last], self.lengths[last]
        goes_on[rows] = self.goes_on(given)[last]
        inside = torch.arange(int(lengths.max())).expand(B, -1)
        real = inside < lengths.unsqueeze(1)
        columns = self.tokens[(starts.unsqueeze(1) + inside).where(real, 0)]
        return columns.to(self.device), real.to(self.device), goes_on

    def batches(self, given: bool) -> tuple[tuple[Batch, ...], Batch | None, Tensor]:
        """All documents whole, in batches: for layers that see a document at once.

        Returns:
            The documents that begin, in batches of lengths of which none is below `ALIKE` times the longest;
            those that go on with a state, in one batch; and the place of each token as in `Plan.place`, in
            the outputs of the first and then of the other.
        """
        if given not in self._batches:
            goes_on = self.goes_on(given)
            order = self.lengths.argsort(descending=True, stable=True)
            groups: list[list[int]] = []
            for document in order[~goes_on[order]].tolist():
                if not groups or self.lengths[document] < ALIKE * self.lengths[groups[-1][0]]:
                    groups.append([])
                groups[-1].append(document)
            old = goes_on.nonzero().squeeze(1)
            place = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)
            outputs, batches = 0, []
            for group in [*(torch.tensor(group) for group in groups), *([old] if len(old) else [])]:
                lengths = self.lengths[group].unsqueeze(1)
                inside = torch.arange(int(lengths.max())).expand(len(group), -1)
                real = inside < lengths
                columns = self.tokens[self.starts[group].unsqueeze(1) + torch.minimum(inside, lengths - 1)]
                place[columns[real]] = outputs + real.flatten().nonzero().squeeze(1)
                outputs += real.numel()
                parts = (columns, real, self.rows[group])
                batches.append(Batch(*(part.to(self.device) for part in parts)))
            last = batches.pop() if len(old) else None
            self._batches[given] = tuple(batches), last, place.to(self.device)
        return self._batches[given]

    def plan(self, step: int, given: bool, prefix: int = 0) -> Plan:
        """How to read the documents, the same plan for all layers that ask alike.

        Args:
            step: tokens after which chunks of the reader end: all of them, for a reader that asks for rows at
                a boundary; the shortest, for one that can make do with the number of tokens before.
            given: whether there is a state that the first documents may go on with.
            prefix: number of tokens in front of every document that begins.
        """
        key = (step, given, prefix)
        if key not in self._plans:
            self._plans[key] = _Planner(self, step, given, prefix).plan()
        return self._plans[key]

    def read(
        self,
        read: Reader,
        inputs: Any,
        state: Any,
        step: int,
        prefix: Tensor | None = None,
        tell_first: bool = False,
    ) -> tuple[Any, Any]:
        """Read the documents with a function for rows.

        Args:
            read: from (inputs, state, real, aligned) to (outputs, state): inputs and outputs are trees of
                tensors [n, L, ...], the state is a tree of tensors [n, ...], None for the initial one; `real`
                [n, L] bool or None; `aligned` says that all rows stand at a boundary, see `Step`. Columns of
                `real` False are zero and must have no effect.
            inputs: tree of tensors [B, T, ...].
            state: tree of tensors [B, ...], from before the call; None for none.
            step: as in `plan`.
            prefix: [P, ...], read in front of every document that begins; for inputs that are one tensor.
            tell_first: give `read` a fifth argument, `first` of `Step`.

        Returns:
            outputs, trees of tensors [B, T, ...], zero for padding; and the states after the rows' last
            documents, None where they are not kept.
        """
        plan = self.plan(step, state is not None, 0 if prefix is None else len(prefix))
        flat = pytree.tree_map_only(Tensor, lambda x: x.flatten(0, 1), inputs)
        if prefix is not None:
            flat = torch.cat([flat, prefix.to(flat.dtype)])
        outputs: list[Any] = []
        states: list[Any] = []

        def states_of(sources: Sequence[Rows]) -> Any:
            parts = [select_rows(state if s.step < 0 else states[s.step], s.rows) for s in sources]
            return join_rows(parts) if parts else None

        for now in plan.steps:
            take = functools.partial(tokens_at, columns=now.columns, real=now.real)
            x = pytree.tree_map_only(Tensor, take, flat)
            told = (now.first,) if tell_first else ()
            y, after = read(x, states_of(now.before), now.real, now.aligned, *told)
            outputs.append(y)
            states.append(after)
        leaves = zip(*(pytree.tree_leaves(y) for y in outputs), strict=True)
        joined = [self.unpack(parts, plan.place) for parts in leaves]
        y = pytree.tree_unflatten(joined, pytree.tree_structure(outputs[0]))
        if not self.keep:
            return y, None
        return y, select_rows(states_of(plan.last), plan.order)

    def unpack(self, parts: Sequence[Tensor | None], place: Tensor) -> Tensor | None:
        """Outputs of all steps [n, L, ...] -> [B, T, ...]; None where there are none."""
        if parts[0] is None:
            return None
        y = torch.cat([part.flatten(0, 1) for part in parts if part is not None])
        y = y.index_select(0, place).unflatten(0, self.shape)
        if self.padded is None:
            return y
        return y.masked_fill(~self.padded.view(*self.shape, *[1] * (y.dim() - 2)), 0)


class _Planner:
    """Lays out the steps of a `Plan`; everything on the CPU until the end."""

    def __init__(self, documents: Documents, step: int, given: bool, prefix: int) -> None:
        self.documents, self.size, self.given, self.prefix = documents, step, given, prefix
        goes_on = documents.goes_on(given)
        self.lengths = documents.lengths + torch.where(goes_on, 0, prefix)
        self.prefixes = torch.where(goes_on, 0, prefix)
        self.wanted = documents.last() if documents.keep else torch.zeros_like(goes_on)
        self.goes_on = goes_on
        self.steps: list[Step] = []
        self.after: dict[int, tuple[int, int]] = {}  # document -> step and row of the state at its end
        self.place = torch.zeros(documents.shape[0] * documents.shape[1], dtype=torch.long)
        self.outputs = 0

    def plan(self) -> Plan:
        new, old = (~self.goes_on).nonzero().squeeze(1), self.goes_on.nonzero().squeeze(1)
        self._go_on(old)
        self._begin(new)
        last, order = self._last()
        device = self.documents.device
        return Plan(tuple(self.steps), self.place.to(device), last, order)

    def _go_on(self, documents: Tensor) -> None:
        """Documents that go on with a state, at whatever place of a chunk they stand: like padded rows."""
        documents = documents[self.lengths[documents].argsort(descending=True, stable=True)]
        if len(documents) == 0:
            return
        ends = self.lengths[documents].tolist()
        before, start = Rows(-1, self.documents.rows[documents]), 0
        for stop in _cuts(ends, []):
            count = sum(end > start for end in ends)
            now = self._step(documents[:count], start, stop, (before,), False, True)
            self.after.update({int(documents[r]): (now, r) for r in range(count) if ends[r] <= stop})
            left, start = sum(end > stop for end in ends), stop
            before = Rows(now, slice(0, left))

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
            before = (Rows(now, slice(0, count)),) if start else ()
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

    def _last(self) -> tuple[tuple[Rows, ...], Tensor]:
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
            self.steps.append(Step(self._to_device(index), real, (), True, None))
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
        before: tuple[Rows, ...],
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
        self.steps.append(Step(self._to_device(index), flags, sources, aligned, first))
        return len(self.steps) - 1

    def _to_device(self, t: Tensor) -> Tensor:
        return t.to(self.documents.device)

    def _sources_to_device(self, sources: Sequence[Rows]) -> tuple[Rows, ...]:
        return tuple(
            s if isinstance(s.rows, slice) else Rows(s.step, self._to_device(s.rows)) for s in sources
        )


def tokens_at(x: Tensor, columns: Tensor, real: Tensor | None = None) -> Tensor:
    """[n, L, ...] of x [tokens, ...] at columns [n, L]; zero where `real` is False."""
    found = x.index_select(0, columns.flatten()).view(*columns.shape, *x.shape[1:])
    return found if real is None else found.masked_fill(~real.view(*columns.shape, *[1] * (x.dim() - 1)), 0)


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


def _sources(places: Sequence[tuple[int, int]]) -> tuple[Rows, ...]:
    """Places (step, row), sorted by step, as one entry per step."""
    steps = sorted({step for step, _ in places})
    return tuple(Rows(s, torch.tensor([row for step, row in places if step == s])) for s in steps)
