"""Text that models are trained and scored on: equal shares of several texts, as plain bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from nested_learning.training.data import Document, PackedDataset, ValidationDataset, load_corpus
from nested_learning.training.data.packing import Sample, TokenizedText, tokenize
from nested_learning.training.data.sources import split_documents
from nested_learning.training.data.streams import DocumentIds, documents_of
from nested_learning.training.data.tokenizers import byte_tokenizer

WIKITEXT = "wikitext2_valid.txt"  # in NESTED_LEARNING_DATA; measured alone, never trained on
TUNING = 0.5  # share of the held-out text that learning rates are chosen on; the rest is reported


@dataclass(frozen=True)
class SplitText:
    """A text in three parts, each in whole documents where there are ten or more, else cut in its middle."""

    train: TokenizedText
    tuning: TokenizedText
    test: TokenizedText


class Shares(Dataset[Sample]):
    """Samples of several datasets in turn, an equal share of each."""

    def __init__(self, parts: Sequence[PackedDataset]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.parts[index % len(self.parts)][index // len(self.parts)]


@lru_cache(maxsize=4)  # the runs of a process read the same text
def split_text(source: str, max_bytes: int) -> SplitText:
    """A source of `load_corpus` in bytes.

    Args:
        source: the source.
        max_bytes: read no more of it.

    Raises:
        ValueError: as `load_corpus`.
    """
    corpus = load_corpus(source, max_bytes=max_bytes)
    held_out = split_documents(corpus.validation, TUNING)

    def ids(documents: Sequence[Document]) -> TokenizedText:
        return tokenize(byte_tokenizer(), [document.text for document in documents])

    return SplitText(ids(corpus.train), ids(held_out.train), ids(held_out.validation))


def name_of(source: str) -> str:
    """The name of a text's figures: the source, without a path's folder and suffix."""
    return Path(source).name.partition(".")[0] or source


def training_samples(
    texts: Mapping[str, SplitText], block_size: int, samples: int, seed: int
) -> Dataset[Sample]:
    """Training blocks [T] of the texts in turn, in an order drawn from the seed."""
    end, share = byte_tokenizer().eos_token_id, -(-samples // len(texts))
    return Shares([PackedDataset(text.train, block_size, share, seed, end) for text in texts.values()])


def held_out_blocks(text: TokenizedText, block_size: int, blocks: int) -> ValidationDataset:
    """At most so many blocks [T], evenly spaced."""
    return ValidationDataset(text, block_size, blocks, byte_tokenizer().eos_token_id)


def long_documents(texts: Mapping[str, SplitText], length: int, most: int) -> DocumentIds:
    """The first `length` bytes of reported documents that have as many, at most `most`, from all texts."""
    chosen = [
        [document[:length] for document in documents_of(text.test.ids, byte_tokenizer().eos_token_id)]
        for text in texts.values()
    ]
    found = [[document for document in documents if len(document) == length] for documents in chosen]
    turns = max(map(len, found))
    return [documents[turn] for turn in range(turns) for documents in found if turn < len(documents)][:most]


def unigram_bits(texts: Mapping[str, SplitText]) -> dict[str, float]:
    """Bits per byte of each reported text under the frequencies of the bytes that are trained on."""
    vocab = len(byte_tokenizer())
    counts = [np.bincount(text.train.ids, minlength=vocab) / len(text.train.ids) for text in texts.values()]
    code = -np.log2((np.mean(counts, axis=0) + 1e-6) / (1 + vocab * 1e-6))
    return {
        name: float(code[text.test.ids].mean() / text.test.bytes_per_token) for name, text in texts.items()
    }


@lru_cache(maxsize=1)
def whole_file(path: Path) -> TokenizedText:
    """A text file as one document of bytes."""
    return tokenize(byte_tokenizer(), [path.read_text(encoding="utf-8")])
