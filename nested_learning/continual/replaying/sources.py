"""Sources of what was read: what is known of each, and how one is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning._errors import unknown
from nested_learning._progress import progress
from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.inputs import Names, read_names
from nested_learning.continual.memory import Memory
from nested_learning.continual.replaying.store import REASONS, Count, Span, Store


@dataclass(frozen=True)
class KnownSource:
    """Name and numbers of a source that was read.

    Args:
        name: name that `observe` was given; None for all text without one.
        tokens: number of tokens that were read.
        writes: number of writes that it went into: it was in the chunk, or replayed.
        kept: number of its tokens in the store.
    """

    name: str | None
    tokens: int
    writes: int
    kept: int


@dataclass(frozen=True)
class Forgotten:
    """Report of `forget`.

    Args:
        source: name of the source.
        tokens: number of its tokens that were taken out of the store.
        rows: indices of the rows that had read it.
        carried: indices of those of them whose weights still carry it; empty where every row is what it
            would be without the source.
        message: sentence that says so, why, and what would take it out.
    """

    source: str | None
    tokens: int
    rows: tuple[int, ...]
    carried: tuple[int, ...]
    message: str

    def __str__(self) -> str:
        return self.message


class Text(NamedTuple):
    """One text of a row as it was read: tokens and masks [n], on the devices of the row."""

    tokens: Tensor
    learn: Tensor
    source: str | None
    label: str | None


def names_read(
    source: Names, label: Names, count: int, *, keeps: bool
) -> list[tuple[str | None, str | None]]:
    """(source, label) of each of `count` sequences.

    Args:
        source, label: names that `observe` was given.
        count: number of sequences.
        keeps: whether the learner keeps text by such names.

    Raises:
        ValueError: names where nothing is kept, no names, or another number of them.
    """
    if not keeps and not (source is None and label is None):
        raise ValueError(
            "source and label are names under which text is kept, but this learner keeps none; "
            "give stack_levels a replay=Replay(…), or leave them out"
        )
    names = read_names("source", source, count), read_names("label", label, count)
    return list(zip(*names, strict=True))


def known_sources(rows: Sequence[Row]) -> list[KnownSource]:
    """The sources of rows, in the order in which they were first read."""
    counts: dict[str | None, Count] = {}
    kept: dict[str | None, int] = {}
    for store in (row.store for row in rows if row.store is not None):
        for name, count in store.counts.items():
            before = counts.get(name, Count())
            counts[name] = Count(before.tokens + count.tokens, before.writes + count.writes)
        for example in store.examples:
            kept[example.source] = kept.get(example.source, 0) + len(example)
    return [KnownSource(name, *count, kept.get(name, 0)) for name, count in counts.items()]


def forget_source(
    memory: Memory, source: str | None, row: int | None, read: Callable[..., object]
) -> Forgotten:
    """Report of what `Learner.forget` does; after an exception the memory is as it was.

    Args:
        memory: memory that forgets.
        source: name of the source.
        row: index of the only row that forgets; None for all.
        read: function that lets a row read and learn: (its index, ids, mask, source, label, a bar).

    Raises:
        ValueError: no row knows such a source.
    """
    counts = {
        index: _counts(memory.row(index)) for index in (range(len(memory.rows)) if row is None else [row])
    }
    if not isinstance(source, (str, type(None))):
        raise ValueError(f"source must be the name of a source, or None, got {source!r}")
    had = [index for index, known in counts.items() if source in known]
    if not any(counts.values()):
        raise ValueError(
            f"unknown source {source!r}. None is known: nothing that was read is kept. Give stack_levels a "
            "replay=Replay(…) before it reads"
        )
    if not had:
        raise unknown(
            "source", str(source), {str(name) for known in counts.values() for name in known if name}
        )
    before, tokens, reasons = memory.snapshot(), 0, dict[int, str]()
    try:
        with progress("learning again", unit="token") as bar:
            for index in had:
                own, store = memory.rows[index], memory.rows[index].store
                assert store is not None
                if store.reason:
                    reasons[index] = store.reason
                    tokens += strike_out(own, store, source)
                    continue
                tokens += store.counts[source].tokens
                memory.rows[index] = memory.new_row()
                texts = [text for text in texts_read(own, store) if text.source != source]
                bar.total = (bar.total or 0) + sum(len(text.tokens) for text in texts)
                for text in texts:
                    read(index, *text, bar)
    except BaseException:
        memory.restore(before)
        raise
    return report(source, tokens, had, list(reasons), list(reasons.values()))


def _counts(row: Row) -> Mapping[str | None, Count]:
    return {} if row.store is None else row.store.counts


def texts_read(row: Row, store: Store) -> list[Text]:
    """Everything that the row has read, in order, from a store that holds all of it."""
    texts: list[Text] = []
    parts = [(e.tokens.long(), e.learn, e.source, e.label, e.begins) for e in store.examples]
    for span, own in _pending(row, store):
        parts.append((row.tokens[own], row.learn[own], *span.run[1:], span.begins))
    for tokens, learn, source, label, begins in parts:
        tokens = tokens.to(row.tokens.device)
        if begins or not texts:
            texts.append(Text(tokens, learn, source, label))
        else:
            last = texts[-1]
            joined = (torch.cat([last.tokens, tokens]), torch.cat([last.learn, learn]))
            texts[-1] = Text(*joined, source, label)
    return texts


def strike_out(row: Row, store: Store, source: str | None) -> int:
    """Take a source out of the row's store and window, and leave its weights; returns the tokens taken out.

    Attention and re-reading begin anew. Tokens of the source that wait for the end of their segment are not
    learned; token 0 stands in their place.
    """
    kept = store.without(source)
    taken = store.tokens - kept.tokens
    tokens, learn = row.tokens.clone(), row.learn.clone()
    for span, own in _pending(row, store):
        if span.run.source == source:
            tokens[own], learn[own] = 0, False
            taken += span.end - span.start
    for state in row.levels:
        state.read = None  # it may hold the source
    row.tokens, row.learn = tokens[row.start :], learn[row.start :]
    row.start, row.context, row.resume, row.answers, row.store = 0, Context(), None, None, kept
    return taken


def report(
    source: str | None, tokens: int, rows: Sequence[int], carried: Sequence[int], reasons: Sequence[str]
) -> Forgotten:
    """The report with its message; `reasons` are those of the stores of the rows in `carried`."""
    name = "the text without a name" if source is None else repr(source)
    message = f"{tokens:,} tokens of {name} were taken out of the store. "
    if carried:
        which = ", ".join(map(str, carried))
        why = "; ".join(dict.fromkeys(REASONS[reason] for reason in reasons))
        message += (
            f"The weights of row {which} still carry it: what remains could not be read again, since the "
            f"store does not hold all that was read ({why}). What would take it out: restoring a snapshot "
            "from before it was read, or reset()."
        )
    else:
        message += "What remains was learned again from the base model, as if it had never been read."
    return Forgotten(source, tokens, tuple(rows), tuple(carried), message)


def _pending(row: Row, store: Store) -> list[tuple[Span, slice]]:
    """Each named part of the unfinished segment, and its place in the row's window."""
    first = row.position - len(row.tokens)
    spans = store.spans(first + row.start, row.position)
    return [(span, slice(span.start - first, span.end - first)) for span in spans]
