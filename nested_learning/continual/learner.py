"""A pretrained model that keeps learning from what it reads."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning.continual.budget import Budget, budget
from nested_learning.continual.class_head import ClassHead, HeadSettings
from nested_learning.continual.classifier import Classifier
from nested_learning.continual.context import evaluating
from nested_learning.continual.deltas import Row
from nested_learning.continual.export import Exported, export
from nested_learning.continual.hidden_features import HiddenFeatures
from nested_learning.continual.inputs import Batch, LearnMask, TextOrIds, read_batch
from nested_learning.continual.level import Level
from nested_learning.continual.memory import Memory
from nested_learning.continual.reader import Reader
from nested_learning.continual.writing import Write, learn_from


class Learner:
    """A base model with levels of deltas on its weights; made by `stack_levels`.

    Text is read in chunks. A chunk is scored before it is learned from, and what it teaches is written to
    deltas, never to the base model: any number of learners may share one. Reading goes on where it
    stopped: a text may come in any pieces.

    A batch has one row of memory per sequence. The first text fixes the number of rows; one row may be
    addressed by `row=`.

    Attributes:
        model: the base model, in its original class.
        tokenizer: tokenizer for text; None if only ids come.
        levels: the levels, fast to slow.
        memory: everything that was learned: save, load, reset, diff, snapshot.
        reader: the reader with the deltas; `reader.plan` says how it reads.
        writes: reports of the boundaries that the last `observe` passed.
        auto: `Learner.auto(model, tokenizer=None, **changes)`, a learner with settings that need no tuning;
            see `nested_learning.continual.auto`.
    """

    auto: ClassVar[Callable[..., Learner]]

    def __init__(self, model: Any, tokenizer: Any, reader: Reader) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.levels: tuple[Level, ...] = tuple(writer.level for writer in reader.writers)
        self.memory = Memory(model, reader.writers, reader.plan)
        self.writes: list[Write] = []
        self.reader = reader

    def __repr__(self) -> str:
        return f"Learner({type(self.model).__name__}, {self.memory!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self.reader.workspace.in_use:
            raise ValueError("deltas are in force: leave `active` before you pickle a learner")
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """A learner that goes on by itself, with a base model of its own."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with self.reader.workspace.bare():
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    # Learning ------------------------------------------------------------------------------------------

    def observe(
        self, text_or_ids: TextOrIds, *, row: int | None = None, learn_mask: LearnMask | None = None
    ) -> Any:
        """Read, score, and learn at every boundary that is passed.

        Args:
            text_or_ids: a text or ids [T] for one row; a list of texts or of ids, or ids [B, T], for B rows.
            row: the row that one sequence is for, where there are several.
            learn_mask: values of the ids' shape, True (or 1) for a token that is to be learned: its
                prediction from all before it counts in the chunk's sum (not that of a chunk's first token,
                which no chunk learns). The others are read and scored alone, such as a user's turns when
                only the answers are to be learned. None for all tokens. Not for text, whose tokens are not
                known.

        Returns:
            surprise, the next-token loss of each token in nats, given all before it in the window: float32
            (float64 under a float64 model) [T] for one sequence, [B, T] for ids [B, T], a list for a list.
            The first token of a text has NaN: nothing predicts it.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, another number of rows than before, or a mask
                of another shape or kind.

        Warns:
            RuntimeWarning: a write was dropped since its loss or gradient was NaN or infinite.
        """
        batch = read_batch(text_or_ids, self.tokenizer, self.model, learn_mask)
        if batch.kind != "one":
            self.memory.set_rows(len(batch.rows))
        self.writes = []
        pairs = zip(self._assign(batch, row), batch.learn, strict=True)
        losses = [self._observe_row(index, ids, learn) for (index, ids), learn in pairs]
        for write in self.writes:
            if write.outcome == "dropped":
                warnings.warn(
                    f"level {write.level} learned nothing from the chunk that ends at token {write.position} "
                    f"of row {write.row}: its loss is {write.loss}, its gradient norm {write.gradient_norm}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return batch.restore(losses)

    def _observe_row(self, index: int, ids: Tensor, learn: Tensor) -> Tensor:
        """Next-token losses [T] of ids [T], where the row learns at every boundary that is passed."""
        row = self.memory.rows[index]
        losses = []
        for piece, ends in self.reader.plan.pieces(row.position, len(ids)):
            if not ends:  # scored for now, and read once more, with gradients, when the segment is complete
                losses.append(self.reader.score(row, ids[piece], learn[piece]))
                continue
            found, lesson = self.reader.read_segment(row, ids[piece], learn[piece])
            losses.append(found)
            self.writes += learn_from(self.reader.writers, row, lesson, index)
            if not lesson.is_finite:
                row.clear_context()  # its keys and values may be NaN as well
        return torch.cat(losses)

    @contextmanager
    def adaptation_scope(self) -> Iterator[Learner]:
        """Whatever is learned inside is undone on leaving, bit for bit, also after an exception.

        The place within the chunks and the attention context are restored as well. Scopes may be nested.
        """
        before = self.memory.snapshot()
        try:
            yield self
        finally:
            self.memory.restore(before)

    # Using what was learned ------------------------------------------------------------------------------

    @contextmanager
    def active(self, row: int = 0, *, levels: Sequence[int] | None = None) -> Iterator[Any]:
        """Inside the scope the base model itself runs with a row's deltas: for anything that takes a model.

        What is learned inside the scope shows in the next one. Other threads that use the same base model
        through learners wait.

        Args:
            row: index of the row whose deltas are in force.
            levels: indices of the levels in force, 0 is the fastest; None for all. A slow level that takes
                over from a fast one (`Level.consolidate`) holds an average of what that one was; alone, it
                answers from the average.

        Yields:
            the model.

        Raises:
            ValueError: there is no such row or level.
        """
        chosen = self.memory.row(row).only(self._chosen(levels))
        with self.reader.workspace.installed(self.reader.writers, chosen):
            yield self.model

    def score(
        self, text_or_ids: TextOrIds, *, row: int | None = None, levels: Sequence[int] | None = None
    ) -> Any:
        """Next-token losses as `observe` returns them, of a text of its own; nothing is learned.

        With one row of memory, any number of sequences is scored by it; with several rows each sequence
        belongs to a row, as in `observe`. `levels` as in `active`.
        """
        batch = read_batch(text_or_ids, self.tokenizer, self.model)
        return batch.restore(self._score_batch(batch, row, levels))

    def _score_batch(self, batch: Batch, row: int | None, levels: Sequence[int] | None) -> list[Tensor]:
        chosen = self._chosen(levels)
        if len(self.memory.rows) == 1 and row is None:
            pairs = [(0, ids) for ids in batch.rows]
        else:
            pairs = self._assign(batch, row)
        return [self._score_row(self.memory.rows[i].only(chosen).unread(), ids) for i, ids in pairs]

    def _score_row(self, row: Row, ids: Tensor) -> Tensor:
        losses, learn = [], torch.zeros(len(ids), dtype=torch.bool)
        for piece, _ in self.reader.plan.pieces(row.position, len(ids)):
            losses.append(self.reader.score(row, ids[piece], learn[piece]))
            row.start = len(row.tokens)  # the next segment may need a new window
        return torch.cat(losses)

    def perplexity(
        self, text_or_ids: TextOrIds, *, row: int | None = None, levels: Sequence[int] | None = None
    ) -> Any:
        """exp of the mean next-token loss of a text of its own; never learns. Arguments as of `score`.

        Returns:
            a float for one sequence, a list of floats for several.

        Raises:
            ValueError: as `observe`, or a sequence of a single token, which has nothing to predict.
        """
        batch = read_batch(text_or_ids, self.tokenizer, self.model)
        if any(len(ids) < 2 for ids in batch.rows):
            raise ValueError("perplexity needs at least two tokens: the first one predicts the second")
        means = [math.exp(float(losses[1:].mean())) for losses in self._score_batch(batch, row, levels)]
        return means[0] if batch.kind == "one" else means

    @torch.no_grad()
    def logits(self, ids: Tensor, *, row: int = 0, levels: Sequence[int] | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T] with a row's deltas (those of `levels`, see `active`): the base
        model's own, bit for bit, where nothing was learned."""
        with self.active(row, levels=levels), evaluating(self.model):
            return self.model(input_ids=ids.to(self.model.device)).logits

    def generate(
        self,
        prompt: str | Tensor,
        *,
        learn: bool = False,
        row: int = 0,
        levels: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Continue a prompt with what a row has learned; transformers' `generate`.

        Args:
            prompt: a text, or ids [T] or [B, T]. It stands for itself: it is not read as a continuation of
                what was observed.
            learn: observe prompt and continuation afterwards (one sequence only).
            row: index of the row whose deltas are in force.
            levels: indices of the levels in force, as in `active`.
            options: keyword arguments of transformers' `generate`, such as max_new_tokens.

        Returns:
            for a text the continuation as text, without special tokens; for ids [B, T] what transformers
            returns; for ids [T] its only row.
        """
        batch = read_batch(prompt, self.tokenizer, self.model)
        if batch.kind == "list":
            raise ValueError(
                "expected one text, ids [T] or ids [B, T]; generate from several texts one by one"
            )
        if learn and len(batch.rows) > 1:
            raise ValueError(
                f"learn=True takes one sequence, got {len(batch.rows)}: which one should row {row} learn?"
            )
        ids = torch.stack(batch.rows)
        options.setdefault("attention_mask", torch.ones_like(ids))
        with self.active(row, levels=levels) as model, evaluating(model):
            output = model.generate(ids, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if learn:
            self.observe(sequences[0], row=row)
        if isinstance(prompt, str):
            return self.tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return output if batch.kind == "matrix" or output is not sequences else sequences[0]

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        row: int = 0,
        levels: Sequence[int] | None = None,
        lora_rank: int | None = None,
        probe: TextOrIds | None = None,
    ) -> Exported:
        """Write what a row has learned so that others can serve it, without this package.

        A checkpoint as save_pretrained writes it, with what was learned added to the weights, in the base
        model's precision: config, generation config, safetensors, and the tokenizer where there is one. Or,
        with `lora_rank`, a LoRA adapter as peft loads it, which also fits a quantised base. The folder is
        there whole or not at all.

        Args:
            folder: path of a folder that is not there yet, or is empty.
            row: index of the row.
            levels: indices of the levels that are exported, as in `active`; None for all.
            lora_rank: rank r of an adapter; None for a checkpoint. A sum of deltas of rank r or less is
                exact, of others the r largest singular values stay.
            probe: one text, or ids [T], on which the logits of what was written are compared with the
                learner's. Default: the end of what the row has read, or some ids of the vocabulary.

        Returns:
            what was written, how far its logits are from the learner's, and what the rank has cut.

        Raises:
            ValueError: the folder is not empty, there is no such row or level, a quantised base without
                `lora_rank`, or a rank below 1.
            OSError: the folder cannot be written; nothing of it is left.
        """
        chosen = self.memory.row(row).only(self._chosen(levels))
        return export(self.reader, self.tokenizer, chosen, folder, lora_rank, probe)

    def classifier(
        self,
        kind: str = "lda",
        *,
        depth: float = 0.33,
        pooling: str = "mean",
        row: int | None = None,
        **options: Any,
    ) -> Classifier:
        """A classifier that grows with its labels, on frozen features: for labels of texts take this, since
        nothing that is trained was better (docs/continual.md has the figures).

        Args:
            kind: "means", "lda" or "kernel lda"; see `HeadSettings`.
            depth: relative depth of the layer whose hidden states are the features, from 0 (the embedding)
                to 1 (the last layer). A third is best on CLINC150 with SmolLM2-135M-Instruct.
            pooling: "mean" over the tokens of a text, or its "last" one.
            row: the features are those under a row's deltas; what that row learns later moves them, while
                what the classifier knows stays. None: those of the base model.
            options: `shrinkage`, `width`, `bandwidth`, `first` and `seed` of `HeadSettings`.

        Raises:
            ValueError: there is no such row, or a value is out of its range.
        """
        try:
            head = ClassHead(HeadSettings(kind, **options))
        except TypeError as error:
            known = ", ".join(HeadSettings.__dataclass_fields__)
            raise ValueError(f"options of a classifier are {known}, got {sorted(options)}") from error
        features = HiddenFeatures(self.reader, self.memory, depth, pooling, row)
        return Classifier(features, self.tokenizer, head)

    def info(self) -> Budget:
        """The memory budget in bytes: base model, deltas, sums, rules, activations; see `Budget`."""
        return budget(self.reader, len(self.memory.rows))

    def _chosen(self, levels: Sequence[int] | None) -> tuple[int, ...] | None:
        """Indices of levels, ascending. ValueError for others."""
        if levels is None:
            return None
        known = range(len(self.levels))
        if isinstance(levels, int) or any(index not in known for index in levels):
            raise ValueError(
                f"levels must be a list of indices from 0 (the fastest) to {known[-1]}, got {levels!r}"
            )
        return tuple(sorted(set(levels)))

    # Rows ------------------------------------------------------------------------------------------------

    def _assign(self, batch: Batch, row: int | None) -> list[tuple[int, Tensor]]:
        """(row of the memory, ids) of each sequence."""
        rows = len(self.memory.rows)
        if row is not None:
            self.memory.row(row)
            if len(batch.rows) != 1:
                raise ValueError(f"row={row} takes one sequence, got {len(batch.rows)}")
            return [(row, batch.rows[0])]
        if len(batch.rows) != rows:
            raise ValueError(
                f"got {len(batch.rows)} sequence(s) for {rows} rows of memory; give one for each, "
                "or name a `row`"
            )
        return list(enumerate(batch.rows))
