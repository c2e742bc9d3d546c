"""A pretrained model that keeps learning from what it reads."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning._progress import Progress, progress
from nested_learning.continual.averages import chosen_levels
from nested_learning.continual.budget import Budget, budget
from nested_learning.continual.context import evaluating
from nested_learning.continual.deltas import Row
from nested_learning.continual.exporting.export import Exported, export
from nested_learning.continual.inputs import (
    Batch,
    LearnMask,
    Names,
    TextOrIds,
    fitting,
    generated_tokens,
    read_batch,
    read_one,
)
from nested_learning.continual.labels.class_head import ClassHead, HeadSettings
from nested_learning.continual.labels.classifier import Classifier
from nested_learning.continual.labels.hidden_features import HiddenFeatures
from nested_learning.continual.level import Level
from nested_learning.continual.memory import Memory
from nested_learning.continual.reader import Reader
from nested_learning.continual.replaying.replayer import NamedText, Replayer
from nested_learning.continual.replaying.retrieval import Insertion, Retrieved, Retriever
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.replaying.sources import (
    Forgotten,
    KnownSource,
    forget_source,
    known_sources,
    names_read,
)
from nested_learning.continual.study import score_ahead, study
from nested_learning.continual.writing import Write


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
        replayer: the replay of what was read; None where nothing is kept.
        auto: `Learner.auto(model, tokenizer=None, **changes)`, a learner with settings that need no tuning;
            see `nested_learning.continual.auto`.
    """

    auto: ClassVar[Callable[..., Learner]]

    def __init__(self, model: Any, tokenizer: Any, reader: Reader, replay: Replay | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.levels: tuple[Level, ...] = tuple(writer.level for writer in reader.writers)
        self.memory = Memory(model, reader.writers, reader.plan, reader.anchors, replay)
        self.writes: list[Write] = []
        self.reader = reader
        self.replayer = None if replay is None else Replayer(reader, replay)
        self._retriever: Retriever | None = None

    def __repr__(self) -> str:
        return f"Learner({type(self.model).__name__}, {self.memory!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self.reader.workspace.in_use:
            raise ValueError("deltas are in force: leave `active` before you pickle a learner")
        return self.__dict__

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """A learner that goes on by itself, with a base model of its own."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with self.reader.workspace.bare():
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    # Learning ------------------------------------------------------------------------------------------

    def observe(
        self,
        text_or_ids: TextOrIds,
        *,
        row: int | None = None,
        learn_mask: LearnMask | None = None,
        source: Names = None,
        label: Names = None,
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
            source: name of where it comes from, for `sources`, `forget` and retrieval; one for all
                sequences or a list with one for each. Text of one source may come in any pieces. Needs
                replay; once the stores were dropped (`memory.drop_stores`) names are taken, and not kept.
            label: label of the text, for replay that is balanced by label; one, or a list. A labelled
                sequence is a text of its own, whose examples have nothing of others. Needs replay.

        Returns:
            surprise, the next-token loss of each token in nats, given all before it in the window: float32
            (float64 under a float64 model) [T] for one sequence, [B, T] for ids [B, T], a list for a list.
            The first token of a text has NaN: nothing predicts it.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, another number of rows than before, a mask of
                another shape or kind, or a name without replay. Nothing is changed then.

        Warns:
            RuntimeWarning: a write was dropped since its loss or gradient was NaN or infinite.
        """
        if torch.is_inference_mode_enabled():  # nothing could be learned, nor be learned from later
            with torch.inference_mode(False):
                return self.observe(text_or_ids, row=row, learn_mask=learn_mask, source=source, label=label)
        batch = read_batch(text_or_ids, self.tokenizer, self.model, learn_mask)
        names = names_read(source, label, len(batch.rows), keeps=self.replayer is not None)
        if row is None and (batch.kind != "one" or self.memory.is_empty):
            self.memory.set_rows(len(batch.rows))
        assigned = self._assign(batch, row)
        self.writes = []
        parts = zip(assigned, batch.learn, names, strict=True)
        with progress("learning", sum(map(len, batch.rows)), "token") as bar:
            losses = [self._observe_row(index, ids, learn, *name, bar) for (index, ids), learn, name in parts]
        for write in self.writes:
            if write.outcome == "dropped":
                warnings.warn(write.complaint, RuntimeWarning, stacklevel=2)
        return batch.restore(losses)

    def _observe_row(
        self, index: int, ids: Tensor, learn: Tensor, source: str | None, label: str | None, bar: Progress
    ) -> Tensor:
        """Next-token losses [T] of ids [T], where row `index` learns at every boundary that is passed.

        Args:
            index: index of the row.
            ids: [T] on the model's device.
            learn: bool [T] on the CPU, whether the levels learn to predict each of them.
            source, label: names of the text, for the store of a row that has one.
            bar: counts the tokens.
        """
        row, losses = self.memory.rows[index], []
        for piece, ends in self.reader.plan.pieces(row.position, len(ids)):
            text = None
            if self.replayer is not None:
                text = NamedText(self.replayer, source, label, begins=piece.start == 0)
            if not ends:  # scored for now, and read once more, with gradients, when the segment is complete
                losses.append(score_ahead(self.reader, row, ids[piece], learn[piece], text))
            else:
                found, writes = study(self.reader, row, ids[piece], learn[piece], index, text)
                losses.append(found)
                self.writes += writes
            bar.advance(len(losses[-1]))
        return torch.cat(losses)

    def sources(self, *, row: int | None = None) -> list[KnownSource]:
        """The sources that were read, in order, by one row or by all; empty where nothing is kept."""
        return known_sources(self.memory.rows if row is None else [self.memory.row(row)])

    @torch.inference_mode(False)
    def forget(self, source: str | None, *, row: int | None = None) -> Forgotten:
        """Take a source out of what is kept and, where all that was read is kept, out of the weights.

        Where the store of a row still holds everything that the row has read, the row learns again from the
        base model and from what remains, in its order: afterwards it is, bit for bit, what it would be if it
        had never read the source. That takes as long as reading did. Otherwise the source's examples and
        its text in the window go, and the report says that the weights still carry it.

        Args:
            source: name of the source; None for all text that was read without one.
            row: the only row that forgets; None for all.

        Raises:
            ValueError: no row knows such a source.
        """
        writes = self.writes
        try:
            return forget_source(self.memory, source, row, self._observe_row)
        finally:
            self.writes = writes

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
            levels: indices of the levels in force, 0 is the fastest; None for all, where a level that has
                averages (`Level.average_of`) is replaced by the slowest of them. A slow level that takes
                over from a fast one (`Level.consolidate`) holds an average of what that one was; alone, it
                answers from the average.

        Yields:
            the model.

        Raises:
            ValueError: there is no such row or level, or a level is asked for together with its average.
        """
        chosen = self.memory.row(row).only(chosen_levels(self.levels, levels))
        with self.reader.workspace.installed(self.reader.writers, chosen):
            yield self.model

    def retrieve(self, query: str | Tensor, tokens: int, *, row: int = 0) -> Retrieved:
        """The passages of what a row keeps that fit a question best, by BM25.

        What replay keeps is searched, complete segments alone: what came after them lies in the window. The
        `ids` of the result are what `score` takes as its context; `generate` does that by itself.

        Args:
            query: text or ids [T] of the question.
            tokens: most tokens of all passages together.
            row: index of the row.

        Raises:
            ValueError: the row keeps nothing, no number of tokens above 0, or bm25s is not installed.
        """
        store = self.memory.row(row).store
        if store is None:
            raise ValueError(
                f"row {row} keeps nothing of what it read, so there is nothing to retrieve; give "
                "stack_levels a replay=Replay(…) before it reads"
            )
        ids = read_one("query", query, self.tokenizer, self.model)
        self._retriever = self._retriever or Retriever(self.tokenizer)
        return self._retriever.best(store, ids, tokens)

    def score(
        self,
        text_or_ids: TextOrIds,
        *,
        row: int | None = None,
        levels: Sequence[int] | None = None,
        context: str | Tensor | None = None,
    ) -> Any:
        """Next-token losses as `observe` returns them, of a text of its own; nothing is learned.

        With one row of memory, any number of sequences is scored by it; with several rows each sequence
        belongs to a row, as in `observe`. `levels` as in `active`. `context` is a text or ids [n], such as
        those of `retrieve`, that stands before each sequence and is not scored.
        """
        batch = read_batch(text_or_ids, self.tokenizer, self.model)
        if context is None or (isinstance(context, (str, Tensor)) and not len(context)):
            return batch.restore(self._score_batch(batch, row, levels))
        before = read_one("context", context, self.tokenizer, self.model)
        joined = dataclasses.replace(batch, rows=[torch.cat([before, ids]) for ids in batch.rows])
        losses = self._score_batch(joined, row, levels)
        return batch.restore([each[len(before) :] for each in losses])

    def _score_batch(self, batch: Batch, row: int | None, levels: Sequence[int] | None) -> list[Tensor]:
        chosen = chosen_levels(self.levels, levels)
        if len(self.memory.rows) == 1 and row is None:
            pairs = [(0, ids) for ids in batch.rows]
        else:
            pairs = self._assign(batch, row)
        with progress("scoring", sum(map(len, batch.rows)), "token") as bar:
            return [self._score_row(self.memory.rows[i].only(chosen).unread(), ids, bar) for i, ids in pairs]

    def _score_row(self, row: Row, ids: Tensor, bar: Progress) -> Tensor:
        losses, learn = [], torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        for piece, _ in self.reader.plan.pieces(row.position, len(ids)):
            losses.append(self.reader.score(row, ids[piece], learn[piece]))
            row.start = len(row.tokens)  # the next segment may need a new window
            bar.advance(len(losses[-1]))
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
        means = [float(losses[1:].double().mean().exp()) for losses in self._score_batch(batch, row, levels)]
        return means[0] if batch.kind == "one" else means

    @torch.no_grad()
    def logits(self, ids: Tensor, *, row: int = 0, levels: Sequence[int] | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T] with a row's deltas (those of `levels`, see `active`): the base
        model's own, bit for bit, where nothing was learned. ValueError for what are no such ids."""
        batch = read_batch(ids, self.tokenizer, self.model)
        if batch.kind != "matrix":
            raise ValueError("expected ids [B, T]; a single text is ids[None]")
        ids = torch.stack(batch.rows)
        fits = fitting(self.model, "a row", ids.shape[1])
        with self.active(row, levels=levels), evaluating(self.model), fits:
            return self.model(input_ids=ids).logits

    def generate(
        self,
        prompt: str | Tensor,
        *,
        learn: bool = False,
        row: int = 0,
        levels: Sequence[int] | None = None,
        retrieve: int | None = None,
        **options: Any,
    ) -> Any:
        """Continue a prompt with what a row has learned; transformers' `generate`.

        Args:
            prompt: a text, or ids [T] or [B, T]. It stands for itself: it is not read as a continuation of
                what was observed.
            learn: observe prompt and continuation afterwards (one sequence only).
            row: index of the row whose deltas are in force.
            levels: indices of the levels in force, as in `active`.
            retrieve: most tokens of passages that fit the prompt best, as `Learner.retrieve` finds them; one
                sequence only. They stand before it as plain text, behind the token that begins a document
                where the prompt has it, and are neither returned nor learned again.
            options: keyword arguments of transformers' `generate`, such as max_new_tokens. Lengths and a
                mask are those of the prompt without the passages.

        Returns:
            for a text the continuation as text, without special tokens; for ids [B, T] what transformers
            returns; for ids [T] its only row. With num_return_sequences above 1 a list of texts, and for
            ids [T] all rows.

        Raises:
            ValueError: what `observe` refuses, or more tokens than the model has learned positions.
        """
        batch = read_batch(prompt, self.tokenizer, self.model)
        if batch.kind == "list":
            raise ValueError(
                "expected one text, ids [T] or ids [B, T]; generate from several texts one by one"
            )
        count = len(batch.rows) * (options.get("num_return_sequences") or 1)
        if learn and count > 1:
            raise ValueError(f"learn=True takes one sequence, got {count}: which one should row {row} learn?")
        ids = torch.stack(batch.rows)
        inserted = Insertion(0, ids[:, :0]) if retrieve is None else self._insertion(batch, retrieve, row)
        inputs = inserted.put_into(ids)
        options = inserted.put_into_options({"attention_mask": torch.ones_like(ids), **options})
        most = generated_tokens(self.model, inputs.shape[1], options)
        fits = fitting(self.model, "a prompt with its continuation", most)
        with self.active(row, levels=levels) as model, evaluating(model), fits:
            output = model.generate(inputs, **options)
        if isinstance(output, Tensor):
            output = sequences = inserted.taken_out_of(output)
        else:
            output.sequences = sequences = inserted.taken_out_of(output.sequences)
        if learn:
            self.observe(sequences[0], row=row)
        one = len(sequences) == 1
        if isinstance(prompt, str):
            texts = self.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
            return texts[0] if one else texts
        return sequences[0] if one and batch.kind == "one" and output is sequences else output

    def _insertion(self, batch: Batch, tokens: int, row: int) -> Insertion:
        """What fits the only prompt of a batch best. ValueError for several prompts."""
        if len(batch.rows) > 1:
            raise ValueError(
                f"retrieve takes one sequence, got {len(batch.rows)}; generate from each by itself"
            )
        (ids,) = batch.rows
        begins = int(ids[0]) == getattr(self.tokenizer, "bos_token_id", None)
        return Insertion(int(begins), self.retrieve(ids, tokens, row=row).ids.to(ids.device)[None])

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
        chosen = self.memory.row(row).only(chosen_levels(self.levels, levels))
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
        """The memory budget in bytes: base model, deltas, sums, rules, store, activations; see `Budget`."""
        return budget(self.reader, len(self.memory.rows), self.replayer)

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
