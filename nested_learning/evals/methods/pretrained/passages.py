"""Retrieval over a running text: its best passages for a prompt, by BM25, before what is asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nested_learning.evals.methods.pretrained.asking import View
from nested_learning.evals.methods.pretrained.reading import Reading
from nested_learning.evals.methods.pretrained.students import Student

HAS_BM25 = importlib.util.find_spec("bm25s") is not None


class PassageStudent(Student):
    """A student that looks up passages of all it has read, on top of another one's way of keeping it.

    A text is cut into passages that overlap by half, so that a sentence of half a passage is whole in one of
    them. The best stand right before the prompt, behind a context that the other student may have: the very
    best last, or in the order in which they were read, as `Learner.retrieve` gives them.

    Args:
        inner: learns from the same text.
        tokenizer: words are compared, not ids.
        size: ids of a passage.
        count: passages that are looked up.
        in_order: they stand in the order of reading, so that what was said last stands last.
    """

    def __init__(
        self, inner: Student, tokenizer: Any, size: int, count: int, *, in_order: bool = False
    ) -> None:
        super().__init__(inner.model)
        self.inner, self.tokenizer, self.size, self.count = inner, tokenizer, size, count
        self.in_order = in_order
        self.passages: list[Tensor] = []

    def learn(self, reading: Reading) -> None:
        self.inner.learn(reading)
        for passage in reading.passages:
            ids = torch.tensor(passage.ids)
            starts = range(0, max(1, len(ids) - self.size // 2), self.size // 2)
            self.passages += [ids[start : start + self.size] for start in starts]

    @contextmanager
    def active(self) -> Iterator[View]:
        import bm25s

        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.passages]
        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)

        def look_up(prompt: Sequence[int]) -> Tensor:
            text = self.tokenizer.decode(prompt, skip_special_tokens=True)
            words = bm25s.tokenize([text], stopwords=None, show_progress=False)
            count = min(self.count, len(self.passages))
            places, scores = index.retrieve(words, k=count, show_progress=False)
            found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
            best = [place for place, score in found if score > 0]
            shown = sorted(best) if self.in_order else best[::-1]
            return torch.cat([torch.empty(0, dtype=torch.long), *(self.passages[place] for place in shown)])

        with self.inner.active() as view:
            yield View(view.model, view.context, look_up)
