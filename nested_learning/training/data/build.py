"""From a configuration to the data of a run: tokenizer, training and validation samples, a summary."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from nested_learning._checks import check_positive
from nested_learning.training.data.config import DataConfig
from nested_learning.training.data.packing import (
    PackedDataset,
    TokenizedText,
    ValidationDataset,
    tokenize,
)
from nested_learning.training.data.sources import load_corpus
from nested_learning.training.data.streaming import StreamedDataset, open_stream
from nested_learning.training.data.streams import (
    CarriedDataset,
    DocumentIds,
    documents_of,
    first_tokens,
    within_blocks,
)
from nested_learning.training.data.tokenizers import make_tokenizer

BPE_SAMPLE_BYTES = 16 << 20  # bytes at the start of a stream that a BPE is trained on


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
        carried: ids of the validation documents of an evaluation that carries the state; empty without.
        scored: ids of the documents that the trained model is scored on by position; empty where it is not.
    """

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset | StreamedDataset | CarriedDataset
    validation: ValidationDataset
    bytes_per_token: float
    summary: dict[str, Any]
    carried: DocumentIds = field(default_factory=list)
    scored: DocumentIds = field(default_factory=list)


def build_data(config: DataConfig, num_train_samples: int, rows: int = 1) -> DataBundle:
    """Read, tokenise and pack the text that `config` names.

    Args:
        config: the text, the tokenizer and the sizes.
        num_train_samples: samples of the whole run, batches times batch size; several epochs if need be.
        rows: batch size, needed where the state is carried: each row then reads documents of its own.

    Raises:
        ValueError: unknown source or tokenizer; empty, binary or too short text; a failed download; fewer
            documents than rows that carry a state, or none as long as those to be scored.
    """
    check_positive(num_train_samples=num_train_samples)
    if config.is_streamed:
        return _build_streamed(config, num_train_samples)
    corpus = load_corpus(
        config.source,
        validation_fraction=config.validation_fraction,
        max_bytes=config.max_bytes,
        text_column=config.text_column,
    )
    texts = [document.text for document in corpus.train]
    tokenizer = make_tokenizer(config.tokenizer, texts, config.bpe_vocab_size)
    text = tokenize(tokenizer, texts)
    end = config.end_of_text(tokenizer)
    train: PackedDataset | CarriedDataset
    if config.carry_state:
        train = CarriedDataset(text, config.block_size, rows, num_train_samples, config.seed, end)
    else:
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
    whole = _whole_documents(config, held_out, end)
    return DataBundle(tokenizer, train, validation, validation.bytes_per_token, summary, *whole)


def _whole_documents(
    config: DataConfig, held_out: TokenizedText, end: int | None
) -> tuple[DocumentIds, DocumentIds]:
    """(validation documents of an evaluation that carries the state, those to be scored by position)."""
    documents = documents_of(held_out.ids, end) if config.carry_state or config.score_length else []
    carried = (
        within_blocks(documents, config.block_size, config.max_validation_blocks)
        if config.carry_state
        else []
    )
    return carried, first_tokens(documents, config.score_length) if config.score_length else carried


def _build_streamed(config: DataConfig, num_train_samples: int) -> DataBundle:
    stream, held_out = open_stream(config.source, config.text_column, config.num_held_out)
    tokenizer = make_tokenizer(
        config.tokenizer, _first_bytes(stream.once(), BPE_SAMPLE_BYTES), config.bpe_vocab_size
    )
    limit = None if config.max_validation_blocks is None else config.max_validation_blocks * config.block_size
    end = config.end_of_text(tokenizer)
    text = _tokenize_first(tokenizer, held_out, limit)
    validation = ValidationDataset(text, config.block_size, config.max_validation_blocks, end)
    train = StreamedDataset(
        stream, tokenizer, config.block_size, num_train_samples, config.seed, config.shuffle_blocks, end
    )
    summary = _summary(config, tokenizer, num_train_samples, validation)
    whole = _whole_documents(config, text, end)
    return DataBundle(tokenizer, train, validation, validation.bytes_per_token, summary, *whole)


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
