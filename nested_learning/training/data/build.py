"""From a configuration to the data of a run: tokenizer, training and validation samples, a summary."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from nested_learning._errors import unknown
from nested_learning.training.data.packing import (
    PackedDataset,
    TokenizedText,
    ValidationDataset,
    check_positive,
    tokenize,
)
from nested_learning.training.data.sources import STREAM_PREFIX, load_corpus
from nested_learning.training.data.streaming import StreamedDataset, open_stream
from nested_learning.training.data.tokenizers import make_tokenizer

DOCUMENTS = ("marked", "joined")
BPE_SAMPLE_BYTES = 16 << 20  # bytes at the start of a stream that a BPE is trained on


@dataclass(kw_only=True)
class DataConfig:
    """The text of a run, its tokenizer and the way it is cut into samples.

    Attributes:
        source: "stdlib" (text of the Python installation), "tinyshakespeare" (downloaded once), the path
            of a text file, folder or glob, or "hf:NAME[:CONFIG]", a streamed `datasets` source.
        tokenizer: "byte", "bpe" (trained on the training text) or the folder of a saved tokenizer.
        bpe_vocab_size: ids of a BPE, bytes and special tokens included.
        block_size: tokens per sample, T.
        documents: what a sample is that holds several documents: "marked", the model keeps them apart, or
            "joined", one text.
        text_column: the column of a `datasets` source that holds the text.
        validation_fraction: share of the text for validation, in (0, 0.5]; a `datasets` source has its
            validation split or `num_held_out` rows instead.
        num_held_out: rows of a `datasets` source without validation split kept for validation.
        max_validation_blocks: blocks of one evaluation, evenly spaced; None for all.
        max_bytes: read no more text than this; not for a `datasets` source, of which a run reads as much as
            it needs.
        shuffle_blocks: blocks of a `datasets` source that are shuffled together.
        seed: seed of the order of the samples.
    """

    source: str = "stdlib"
    tokenizer: str = "byte"
    bpe_vocab_size: int = 4096
    block_size: int = 256
    documents: Literal["marked", "joined"] = "marked"
    text_column: str = "text"
    validation_fraction: float = 0.1
    num_held_out: int = 200
    max_validation_blocks: int | None = 512
    max_bytes: int | None = None
    shuffle_blocks: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("source", "tokenizer", "text_column"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.documents not in DOCUMENTS:
            raise unknown("documents", str(self.documents), DOCUMENTS)
        check_positive(
            bpe_vocab_size=self.bpe_vocab_size,
            block_size=self.block_size,
            num_held_out=self.num_held_out,
            shuffle_blocks=self.shuffle_blocks,
            max_validation_blocks=1 if self.max_validation_blocks is None else self.max_validation_blocks,
            max_bytes=1 if self.max_bytes is None else self.max_bytes,
        )
        if self.block_size < 2:
            raise ValueError("block_size must be at least 2: a block of one token predicts nothing")
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(f"validation_fraction must be in (0, 0.5], got {self.validation_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.is_streamed and self.max_bytes is not None:
            raise ValueError(
                f"max_bytes has no effect on the streamed source {self.source!r}: leave it out; "
                "the number of training samples limits what is read"
            )

    @property
    def is_streamed(self) -> bool:
        return self.source.startswith(STREAM_PREFIX)

    def end_of_text(self, tokenizer: PreTrainedTokenizerFast) -> int | None:
        """The token after which samples mark the begin of a document; None where documents are joined."""
        return tokenizer.eos_token_id if self.documents == "marked" else None


@dataclass(frozen=True)
class DataBundle:
    """The data of a run, as `build_data` makes them.

    Attributes:
        tokenizer: the tokenizer, to be saved with the model.
        train: samples {"input_ids", "labels"} [T], with "position_ids" where documents are marked, in the
            order of training: sample i of the run is item i (use a sequential sampler), or the i-th of an
            iteration.
        validation: samples likewise, the same ones every time.
        bytes_per_token: UTF-8 bytes per token of the validation text, for `bits_per_byte`.
        summary: sizes and sources of the text that was read, ready for JSON.
    """

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset | StreamedDataset
    validation: ValidationDataset
    bytes_per_token: float
    summary: dict[str, Any]


def build_data(config: DataConfig, num_train_samples: int) -> DataBundle:
    """Read, tokenise and pack the text that `config` names.

    Args:
        config: the text, the tokenizer and the sizes.
        num_train_samples: samples of the whole run, batches times batch size; several epochs if need be.

    Raises:
        ValueError: unknown source or tokenizer; empty, binary or too short text; a failed download.
    """
    check_positive(num_train_samples=num_train_samples)
    if config.is_streamed:
        return _build_streamed(config, num_train_samples)
    corpus = load_corpus(
        config.source, validation_fraction=config.validation_fraction, max_bytes=config.max_bytes
    )
    texts = [document.text for document in corpus.train]
    tokenizer = make_tokenizer(config.tokenizer, texts, config.bpe_vocab_size)
    text = tokenize(tokenizer, texts)
    end = config.end_of_text(tokenizer)
    train = PackedDataset(text, config.block_size, num_train_samples, config.seed, end)
    held_out = tokenize(tokenizer, [document.text for document in corpus.validation])
    validation = ValidationDataset(held_out, config.block_size, config.max_validation_blocks, end)
    summary = _summary(config, tokenizer, num_train_samples, validation) | {
        "train_documents": len(corpus.train),
        "train_bytes": text.num_bytes,
        "train_tokens": len(text.ids),
        "epochs": num_train_samples / train.blocks_per_epoch,
        "validation_documents": len(corpus.validation),
        "fingerprint": corpus.fingerprint(),
    }
    return DataBundle(tokenizer, train, validation, validation.bytes_per_token, summary)


def _build_streamed(config: DataConfig, num_train_samples: int) -> DataBundle:
    stream, held_out = open_stream(config.source, config.text_column, config.num_held_out)
    tokenizer = make_tokenizer(
        config.tokenizer, _first_bytes(stream.once(), BPE_SAMPLE_BYTES), config.bpe_vocab_size
    )
    limit = None if config.max_validation_blocks is None else config.max_validation_blocks * config.block_size
    end = config.end_of_text(tokenizer)
    validation = ValidationDataset(
        _tokenize_first(tokenizer, held_out, limit), config.block_size, config.max_validation_blocks, end
    )
    train = StreamedDataset(
        stream, tokenizer, config.block_size, num_train_samples, config.seed, config.shuffle_blocks, end
    )
    summary = _summary(config, tokenizer, num_train_samples, validation)
    return DataBundle(tokenizer, train, validation, validation.bytes_per_token, summary)


def _first_bytes(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """Texts until they hold `num_bytes` together."""
    for text in texts:
        yield text
        num_bytes -= len(text.encode())
        if num_bytes <= 0:
            return


def _tokenize_first(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], num_tokens: int | None
) -> TokenizedText:
    """Whole texts until they make `num_tokens` tokens, or all of them."""
    parts: list[TokenizedText] = []
    for text in texts:
        parts.append(tokenize(tokenizer, [text]))
        if num_tokens is not None and sum(len(part.ids) for part in parts) >= num_tokens:
            break
    if not parts:
        raise ValueError("the validation part has no text; choose another data set or column")
    return TokenizedText(np.concatenate([part.ids for part in parts]), sum(part.num_bytes for part in parts))


def _summary(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    num_train_samples: int,
    validation: ValidationDataset,
) -> dict[str, Any]:
    summary = asdict(config) | {
        "vocab_size": len(tokenizer),
        "train_samples": num_train_samples,
        "validation_blocks": len(validation),
        "validation_tokens": len(validation.tokens),
        "bytes_per_token": validation.bytes_per_token,
    }
    if config.source == "stdlib":
        summary["python_version"] = platform.python_version()  # another version carries another text
    return summary
