"""Text for training: sources, tokenizers, packing. One call, `build_data`, from a configuration.

Tokenizers are byte-level and real transformers tokenizers; sources are split into training and
validation; samples are blocks of T tokens that depend on (seed, index) alone. Names are imported when
they are first used: the configuration alone needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nested_learning._lazy import names_on_first_use

if TYPE_CHECKING:
    from nested_learning.training.data.build import DataBundle, build_data
    from nested_learning.training.data.config import DataConfig
    from nested_learning.training.data.packing import PackedDataset, ValidationDataset, bits_per_byte
    from nested_learning.training.data.sources import Corpus, Document, load_corpus
    from nested_learning.training.data.streaming import StreamedDataset
    from nested_learning.training.data.streams import CarriedDataset, DocumentBlocks
    from nested_learning.training.data.tokenizers import byte_tokenizer, load_tokenizer, train_bpe
else:
    _WHERE = {
        "build": ("DataBundle", "build_data"),
        "config": ("DataConfig",),
        "packing": ("PackedDataset", "ValidationDataset", "bits_per_byte"),
        "sources": ("Corpus", "Document", "load_corpus"),
        "streaming": ("StreamedDataset",),
        "streams": ("CarriedDataset", "DocumentBlocks"),
        "tokenizers": ("byte_tokenizer", "load_tokenizer", "train_bpe"),
    }
    __getattr__, __dir__ = names_on_first_use(
        __name__, {name: f"{__name__}.{module}" for module, names in _WHERE.items() for name in names}
    )

__all__ = [
    "CarriedDataset",
    "Corpus",
    "DataBundle",
    "DataConfig",
    "Document",
    "DocumentBlocks",
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
