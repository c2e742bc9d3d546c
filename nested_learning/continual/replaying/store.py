"""The store of a row: examples of what it read, each with the name of its source, in the order of the text.

A store is a value. It changes when a segment is complete, after the levels have written, so that a chunk is
not replayed into itself and nothing depends on the pieces in which a text comes. Tokens of the unfinished
segment are in the row's window alone; the store knows their names by its runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Why a store does not hold all that was read, and what a report says of it.
REASONS = {
    "late": "nothing was kept when the text began",
    "dropped": "the store was full and dropped examples",
    "reset": "a level was reset since",
    "forgotten": "another source was forgotten since, without learning again",
}


class NamedRun(NamedTuple):
    """Text of one name, from token `start` of the row to the start of the next run."""

    start: int
    source: str | None
    label: str | None


class Count(NamedTuple):
    """Tokens of a source that were read, and writes of levels that it went into."""

    tokens: int = 0
    writes: int = 0


class Span(NamedTuple):
    """Tokens of one run within a stretch of text: [start, end), and whether the run begins there."""

    start: int
    end: int
    run: NamedRun
    begins: bool


@dataclass(frozen=True, eq=False)
class KeptExample:
    """Neighbouring tokens of one run.

    Args:
        tokens: ids [n] on the CPU, in the dtype of `compact_dtype`.
        learn: bool [n] on the CPU, whether levels learn to predict each token.
        start: position of the first token in the row's text.
        source: name of the source; None for text without a name.
        label: label of the text; None without.
        begins: whether the first token is the first of its run.
        loss: sum of the next-token losses (nats) of the tokens that are learned, as they were when the
            tokens were read; NaN where one of them was not finite.
    """

    tokens: Tensor
    learn: Tensor
    start: int
    source: str | None
    label: str | None
    begins: bool
    loss: float

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @cached_property
    def learned(self) -> int:
        """Number of tokens that are learned when the example is read alone: its first has no prediction."""
        return int(self.learn[1:].sum()) if math.isfinite(self.loss) else 0

    @cached_property
    def surprise(self) -> float:
        """Mean loss of the learned tokens in nats; 0 without any."""
        return self.loss / max(int(self.learn.sum()), 1) if math.isfinite(self.loss) else 0.0

    def joined(self, other: KeptExample) -> KeptExample:
        """Example of these tokens and those of `other`, which follow."""
        return dataclasses.replace(
            self,
            tokens=torch.cat([self.tokens, other.tokens]),
            learn=torch.cat([self.learn, other.learn]),
            loss=self.loss + other.loss,
        )


@dataclass(frozen=True, eq=False)
class Store:
    """Examples that one row keeps, and their names. A value: none of its parts is changed later.

    Args:
        examples: examples in the order of the text.
        runs: names of the text since the slowest level's running chunk began, and maybe of some before.
        counts: tokens and writes by source.
        reason: why the store does not hold all that was read, a key of `REASONS`; empty where it does.
    """

    examples: tuple[KeptExample, ...] = ()
    runs: tuple[NamedRun, ...] = ()
    counts: Mapping[str | None, Count] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def late(cls, position: int) -> Store:
        """The store of a row that has read `position` tokens without one."""
        if not position:
            return cls()
        return cls(runs=(NamedRun(0, None, None),), counts={None: Count(position)}, reason="late")

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(len(example) for example in self.examples)

    def named(self, start: int, count: int, source: str | None, label: str | None, begins: bool) -> Store:
        """Store that knows the names of `count` tokens from `start` on.

        Unlabelled text continues the run of the same source before it; a labelled text is a run of its own,
        which `begins` with these tokens or goes on.
        """
        runs, last = self.runs, self.runs[-1] if self.runs else None
        if last is None or last[1:] != (source, label) or (begins and label is not None):
            runs = (*runs, NamedRun(start, source, label))
        before = self.counts.get(source, Count())
        counts = {**self.counts, source: before._replace(tokens=before.tokens + count)}
        return dataclasses.replace(self, runs=runs, counts=counts)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """The named parts of the tokens [start, end), which lie within the runs."""
        ends = [run.start for run in self.runs[1:]] + [end]
        for run, run_end in zip(self.runs, ends, strict=True):
            first, last = max(run.start, start), min(run_end, end)
            if first < last:
                yield Span(first, last, run, begins=first == run.start)

    def taken(self, start: int, tokens: Tensor, learn: Tensor, losses: Tensor, piece: int) -> Store:
        """Store with the tokens of a segment, cut into examples of at most `piece` tokens.

        Args:
            start: position of the first token, which a run has been named for.
            tokens: ids [n] on the CPU, in the store's dtype.
            learn: bool [n] on the CPU.
            losses: next-token losses [n] on the CPU; 0 for a token that nothing predicts.
            piece: most tokens of an example.
        """
        examples = list(self.examples)
        losses = torch.where(learn, losses, 0.0)
        for span in self.spans(start, start + len(tokens)):
            at = span.start
            while at < span.end:
                begins = span.begins and at == span.start
                last = examples[-1] if examples else None
                room = piece - len(last) if last and last.end == at and not begins else 0
                end = min(span.end, at + (room if room > 0 else piece))
                own = slice(at - start, end - start)
                _, source, label = span.run
                parts = (tokens[own].clone(), learn[own].clone())
                new = KeptExample(*parts, at, source, label, begins, float(losses[own].sum()))
                if last and room > 0:
                    examples[-1] = last.joined(new)
                else:
                    examples.append(new)
                at = end
        return dataclasses.replace(self, examples=tuple(examples))

    def written(self, names: Sequence[set[str | None]], runs_from: int) -> Store:
        """Store that counts one write for each set of sources, and forgets runs that ended by `runs_from`."""
        counts = dict(self.counts)
        for sources in names:
            for source in sources & counts.keys():
                counts[source] = counts[source]._replace(writes=counts[source].writes + 1)
        ends = [run.start for run in self.runs[1:]]
        gone = sum(end <= runs_from for end in ends)
        return dataclasses.replace(self, counts=counts, runs=self.runs[gone:])

    def incomplete(self, reason: str) -> Store:
        """Store that does not hold all that was read, for this reason or one before it."""
        return dataclasses.replace(self, reason=self.reason or reason)

    def without(self, source: str | None) -> Store:
        """Store without the examples of a source; what was read of it stays counted."""
        kept = tuple(example for example in self.examples if example.source != source)
        return dataclasses.replace(self, examples=kept).incomplete("forgotten")


def compact_dtype(vocab_size: int) -> torch.dtype:
    """The smallest dtype of whole numbers that holds all ids of a vocabulary."""
    if vocab_size <= 2**8:
        return torch.uint8
    return torch.uint16 if vocab_size <= 2**16 else torch.int32
