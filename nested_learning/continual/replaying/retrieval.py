"""Retrieval: passages of what a row keeps, ranked by BM25 for a question, to be put in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.replaying.store import KeptExample, Store
from nested_learning.optimizers.checks import COUNT

PASSAGE = 128  # most tokens of a passage, where examples are not longer
INSTALL = "retrieval needs bm25s: pip install 'nested-learning-torch[retrieval]'"
WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True, eq=False)
class KeptPassage:
    """Neighbouring tokens of one text that was read.

    Args:
        ids: [n] on the CPU.
        text: its text; None for a learner without a tokenizer.
        source: name of the source; None for text without one.
        start: position of the first token in the row's text.
        score: BM25's score for the question.
    """

    ids: Tensor
    text: str | None
    source: str | None
    start: int
    score: float


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Passages that were found for a question.

    Args:
        passages: the best passages, in the order in which they were read, so that later text comes later.
        ids: [n] on the CPU, all passages with a line break after each (none without a tokenizer).
    """

    passages: tuple[KeptPassage, ...]
    ids: Tensor

    @property
    def text(self) -> str:
        """The passages' texts, each with a line break behind it."""
        return "".join(f"{passage.text}\n" for passage in self.passages if passage.text is not None)


@dataclass(frozen=True, eq=False)
class Insertion:
    """Passages in a prompt, which are read with it and not returned.

    Args:
        at: number of the prompt's tokens that stand before them.
        passages: ids [1, n].
    """

    at: int
    passages: Tensor

    def put_into(self, ids: Tensor) -> Tensor:
        """Ids [1, T + n] of the prompt with the passages; `ids` [B, T] itself without any."""
        if not self.passages.shape[1]:
            return ids
        return torch.cat([ids[:, : self.at], self.passages, ids[:, self.at :]], dim=1)

    def put_into_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `generate` for the prompt with the passages: mask and lengths are given without."""
        found, count = dict(options), self.passages.shape[1]
        if not count:
            return found
        mask = found["attention_mask"]
        passages = mask.new_ones(len(mask), count)
        found["attention_mask"] = torch.cat([mask[:, : self.at], passages, mask[:, self.at :]], dim=1)
        for name in ("max_length", "min_length"):
            if found.get(name) is not None:
                found[name] += count
        return found

    def taken_out_of(self, ids: Tensor) -> Tensor:
        """Ids [R, T] of R continued prompts [R, T + n] without the passages."""
        count = self.passages.shape[1]
        return torch.cat([ids[:, : self.at], ids[:, self.at + count :]], dim=1) if count else ids


class Retriever:
    """BM25 (bm25s, its defaults) over passages of stores; the index of a store is made once.

    A passage is made of neighbouring examples of one text, up to 128 tokens. Terms are the words of the
    text in lower case, or the ids where there is no tokenizer.

    Args:
        tokenizer: tokenizer of the model; None where only ids are read.

    Raises:
        ValueError: bm25s is not installed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bm25s = check_installed()
        self._indexed: tuple[Store, list[KeptPassage], Any] | None = None
        self._break = [] if tokenizer is None else tokenizer("\n", add_special_tokens=False)["input_ids"]

    def __reduce__(self) -> Any:
        return type(self), (self._tokenizer,)  # the index is made again from the store

    def best(self, store: Store, query: Tensor, tokens: int) -> Retrieved:
        """The best passages for a question that together have at most `tokens` tokens, line breaks included.

        Passages are taken from the best down, as far as they share a term with the question and fit; a best
        one that does not fit is cut. Of equal ones the earlier comes first.

        Args:
            store: what is searched.
            query: ids of the question [n].
            tokens: most tokens.

        Raises:
            ValueError: `tokens` is no whole number above 0.
        """
        room = COUNT.check("tokens", tokens)
        chosen: list[KeptPassage] = []
        passages, scores = self._scores(store, query)
        for index in sorted(range(len(passages)), key=lambda i: (-scores[i], i)):
            ids = passages[index].ids
            if scores[index] <= 0:
                break
            if not chosen and len(ids) + len(self._break) > room:
                ids = ids[: max(room - len(self._break), 0)]
            if len(ids) and len(ids) + len(self._break) <= room:
                room -= len(ids) + len(self._break)
                chosen.append(self._passage(passages[index], ids, scores[index]))
        chosen.sort(key=lambda passage: passage.start)
        gap = torch.tensor(self._break, dtype=torch.long, device="cpu")
        parts = [part for passage in chosen for part in (passage.ids, gap)]
        return Retrieved(tuple(chosen), torch.cat([gap[:0], *parts]))

    def _scores(self, store: Store, query: Tensor) -> tuple[list[KeptPassage], list[float]]:
        if self._indexed is None or self._indexed[0] is not store:
            passages = [self._passage(example, example.tokens.long(), 0.0) for example in _joined(store)]
            terms = self._terms([passage.ids for passage in passages])
            index = self._bm25s.BM25() if any(terms) else None
            if index is not None:
                index.index(terms, show_progress=False)
            self._indexed = store, passages, index
        _, passages, index = self._indexed
        asked = self._terms([query.cpu()])[0]
        if index is None or not asked:
            return passages, [0.0] * len(passages)
        return passages, index.get_scores(asked).tolist()

    def _terms(self, rows: Sequence[Tensor]) -> list[list[str]]:
        if self._tokenizer is None:
            return [[str(token) for token in row.tolist()] for row in rows]
        texts = [self._text(row) or "" for row in rows]
        options = {"stopwords": [], "token_pattern": WORD, "return_ids": False, "show_progress": False}
        return self._bm25s.tokenize(texts, **options)

    def _text(self, ids: Tensor) -> str | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _passage(self, found: KeptExample | KeptPassage, ids: Tensor, score: float) -> KeptPassage:
        return KeptPassage(ids, self._text(ids), found.source, found.start, score)


def _joined(store: Store) -> list[KeptExample]:
    """Examples of a store, those of one text that follow each other joined up to the size of a passage."""
    joined: list[KeptExample] = []
    for example in store.examples:
        last = joined[-1] if joined else None
        if last and last.end == example.start and not example.begins and len(last) + len(example) <= PASSAGE:
            joined[-1] = last.joined(example)
        else:
            joined.append(example)
    return joined


def check_installed() -> Any:
    """The package bm25s. ValueError where it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise ValueError(INSTALL) from None
    return bm25s
