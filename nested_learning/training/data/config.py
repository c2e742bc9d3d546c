"""The text of a run, as flags, a YAML file and Python fill it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nested_learning._checks import check_positive, check_types
from nested_learning._errors import unknown

DOCUMENTS = ("marked", "joined")
STREAM_PREFIX = "hf:"


@dataclass(kw_only=True)
class DataConfig:
    """The text of a run, its tokenizer and the way it is cut into samples.

    Attributes:
        source: "stdlib" (text of the Python installation), "tinyshakespeare" (downloaded once), the path
            of a file, folder or glob, or "hf:NAME[:CONFIG]", a streamed `datasets` source. A .jsonl, .json,
            .csv, .tsv or .parquet file has a document in each row, any other is a text; compressed as .gz,
            .bz2, .xz or (with zstandard) .zst they are read, too.
        tokenizer: "byte", "bpe" (trained on the training text) or the folder of a saved tokenizer.
        bpe_vocab_size: ids of a BPE, bytes and special tokens included.
        block_size: tokens per sample, T.
        documents: what a sample is that holds several documents: "marked", the model keeps them apart, or
            "joined", one text.
        text_column: the column of a file of rows or of a `datasets` source that holds the text; in a file
            without a column "text" that stands for the only column of strings.
        validation_fraction: share of the text for validation, in (0, 0.5]; a `datasets` source has its
            validation split or `num_held_out` rows instead.
        num_held_out: rows of a `datasets` source without validation split kept for validation.
        max_validation_blocks: blocks of one evaluation, evenly spaced; None for all.
        max_bytes: read no more text than this; not for a `datasets` source, of which a run reads as much as
            it needs.
        shuffle_blocks: blocks of a `datasets` source that are shuffled together.
        carry_state: let each row of the batch read documents in order, block after block, and go on in each
            block from the state after the one before it, detached; it is reset where a document begins.
            False: shuffled blocks, each from the empty state.
        score_length: score the trained model by position in the document, on the first so many tokens of
            every validation document that has as many. None: where the state is carried, on the documents of
            an evaluation, otherwise not at all.
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
    carry_state: bool = False
    score_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data.")
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
        if self.score_length is not None and self.score_length < 2:
            raise ValueError(
                f"score_length must be at least 2, got {self.score_length}: a token predicts the next"
            )
        if self.is_streamed and self.carry_state:
            raise ValueError(
                f"carry_state lets each row read documents in order, but the source {self.source!r} streams "
                "blocks that are shuffled together: save its text to files and give those with --data PATH, "
                "or leave --data.carry_state false"
            )
        if self.is_streamed and self.max_bytes is not None:
            raise ValueError(
                f"max_bytes has no effect on the streamed source {self.source!r}: leave it out; "
                "the number of training samples limits what is read"
            )

    @property
    def is_streamed(self) -> bool:
        return self.source.startswith(STREAM_PREFIX)

    def end_of_text(self, tokenizer: Any) -> int | None:
        """The token after which samples mark the begin of a document; None where documents are joined.

        Args:
            tokenizer: a tokenizer of transformers.
        """
        return tokenizer.eos_token_id if self.documents == "marked" else None
