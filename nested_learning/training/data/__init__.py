"""Text for training: sources, tokenizers, packing. One call, `build_data`, from a configuration.

Tokenizers are byte-level and real transformers tokenizers; sources are split into training and
validation; samples are blocks of T tokens that depend on (seed, index) alone.
"""

from __future__ import annotations

from nested_learning.training.data.build import DataBundle, DataConfig, build_data
from nested_learning.training.data.packing import PackedDataset, ValidationDataset, bits_per_byte
from nested_learning.training.data.sources import Corpus, Document, load_corpus
from nested_learning.training.data.streaming import StreamedDataset
from nested_learning.training.data.tokenizers import byte_tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Corpus",
    "DataBundle",
    "DataConfig",
    "Document",
    "PackedDataset",
    "StreamedDataset",
    "ValidationDataset",
    "bits_per_byte",
    "build_data",
    "byte_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "train_bpe",
]
