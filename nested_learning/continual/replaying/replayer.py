"""Replay while a row reads: kept examples are read again at boundaries, and new text is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning.continual.deltas import Row
from nested_learning.continual.inputs import vocabulary_size
from nested_learning.continual.lesson import Lesson, Replayed
from nested_learning.continual.reader import Reader, gradients, learned_sum
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.replaying.store import KeptExample, compact_dtype
from nested_learning.continual.writing import Write, accumulate
from nested_learning.memory.state import Weights


class Replayer:
    """Replays for any row that has a store; for one without, it does nothing.

    Args:
        reader: the reader of the rows.
        settings: how to replay.

    Raises:
        ValueError: the settings are none, or an example does not fit into the window.
    """

    def __init__(self, reader: Reader, settings: Replay) -> None:
        if not isinstance(settings, Replay):
            raise ValueError(f"replay must be a Replay(…) or None, got {settings!r}")
        if settings.piece > reader.plan.window:
            raise ValueError(
                f"an example of {settings.piece} tokens (piece) does not fit into the window of "
                f"{reader.plan.window}; choose a smaller piece"
            )
        self.reader = reader
        self.settings = settings
        vocab_size = vocabulary_size(reader.model)
        self.dtype = compact_dtype(vocab_size)

    # Reading again -------------------------------------------------------------------------------------

    def read(self, row: Row, lesson: Lesson) -> dict[int, Replayed]:
        """Replayed examples of each level that learns and whose chunk ends with the segment just read.

        The levels have not written yet. An example whose loss is not finite takes all those that the level
        replays with it out.
        """
        drawn = self._drawn(row, lesson)
        if not drawn:
            return {}
        found: dict[int, Replayed] = {}
        with self.reader.learning(row) as leaves:
            for index, examples in drawn.items():
                own = {key: leaves[key] for key in self.reader.writers[index].keys.values()}
                loss, grads = self._gradients(examples, own)
                if math.isfinite(loss):
                    count = sum(example.learned for example in examples)
                    found[index] = Replayed(count, grads, frozenset(e.source for e in examples))
        return found

    def _drawn(self, row: Row, lesson: Lesson) -> dict[int, list[KeptExample]]:
        """The examples that each level replays, by its index; no entry where it replays none."""
        drawn: dict[int, list[KeptExample]] = {}
        if row.store is None or not lesson.is_finite:
            return drawn
        for writer, state in zip(self.reader.writers, row.levels, strict=True):
            size = writer.level.chunk_size
            if writer.learns and row.position % size == 0:
                learned = state.pairs + sum(pairs.count for pairs in lesson.within(size))
                place = f"{writer.index}/{row.position}"
                chosen = self.settings.drawn(row.store, learned, row.position - size, place)
                if chosen:
                    drawn[writer.index] = chosen
        return drawn

    def _gradients(self, examples: Sequence[KeptExample], leaves: Weights) -> tuple[float, Weights]:
        """Sum of the losses of the learned tokens, and its gradient by key, in passes of about a segment."""
        device = self.reader.model.device
        total, grads = torch.zeros((), device=device), dict[str, Tensor]()
        for batch in _passes(examples, self.reader.plan.segment):
            tokens = _padded([example.tokens.long() for example in batch]).to(device)
            learn = _padded([example.learn for example in batch])[:, 1:]
            with torch.enable_grad():
                # Padding stands behind the tokens, where no token sees it.
                logits = self.reader.model(input_ids=tokens[:, :-1], use_cache=False).logits
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
                loss = learned_sum(losses, learn.flatten())
                accumulate(grads, gradients(loss, leaves))
            total = total + loss.detach()
        return float(total), grads

    # Keeping -------------------------------------------------------------------------------------------

    def name(self, row: Row, count: int, source: str | None, label: str | None, begins: bool) -> None:
        """Tell the row's store the names of the `count` tokens just read; see `Store.named`."""
        if row.store is not None:
            row.store = row.store.named(row.position - count, count, source, label, begins)

    def keep(
        self, row: Row, lesson: Lesson, writes: Sequence[Write], replayed: Mapping[int, Replayed]
    ) -> None:
        """Put the segment that the row has just learned into its store."""
        if row.store is None:
            return
        end, levels = row.position, [writer.level for writer in self.reader.writers]
        names = []
        for write in writes:
            if write.outcome == "written":
                chunk = row.store.spans(end - levels[write.level].chunk_size, end)
                again = replayed[write.level].sources if write.level in replayed else frozenset()
                names.append({span.run.source for span in chunk} | again)
        tokens = row.tokens[len(row.tokens) - (end - lesson.start) :]
        learn = row.learn[len(row.learn) - len(tokens) :]
        losses = lesson.losses.to("cpu", torch.float64)
        losses = F.pad(losses, (len(tokens) - len(losses), 0))
        store = row.store.taken(lesson.start, tokens.cpu().to(self.dtype), learn, losses, self.settings.piece)
        # Every level's running chunk begins where its runs are still known.
        running = min(end // level.chunk_size * level.chunk_size for level in levels)
        row.store = self.settings.bounded(store.written(names, running))


def _passes(examples: Sequence[KeptExample], size: int) -> Iterator[Sequence[KeptExample]]:
    """The examples in their order, as many at once as have `size` tokens, padding counted; one at least."""
    first, longest = 0, 0
    for place, example in enumerate(examples):
        longest = max(longest, len(example))
        if first < place and (place - first + 1) * longest > size:
            yield examples[first:place]
            first, longest = place, len(example)
    yield examples[first:]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [n_i] in one tensor [B, max n_i], zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class NamedText(NamedTuple):
    """A piece of text that a row reads and keeps, with its names.

    Attributes:
        replayer: what keeps it.
        source, label: names of the text.
        begins: whether the piece is the text's first one.
    """

    replayer: Replayer
    source: str | None
    label: str | None
    begins: bool

    def name(self, row: Row, count: int) -> None:
        """Tell the row's store the names of the `count` tokens just read."""
        self.replayer.name(row, count, self.source, self.label, self.begins)
