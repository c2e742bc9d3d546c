"""Blocks of T tokens out of one long row of tokens: every sample a function of (seed, index) alone.

Documents are joined end to end, each closed by its end-of-text token, and cut into blocks without
padding. The samples say where documents begin, so that a model keeps them apart, unless they are to be read
as one text. Since sample i depends on nothing but the seed and i, a run resumes at the exact batch by its
index, and processes that share the indices among them see together the batches that one would see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nested_learning._checks import check_positive
from nested_learning.training.data.tokenizers import encode_documents

Sample = dict[str, Tensor]
IGNORED = -100  # the label that transformers' losses do not count


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per UTF-8 byte of text: comparable between tokenizers."""
    return nats_per_token / (bytes_per_token * math.log(2))


def sample_of(block: np.ndarray, end_of_text: int | None = None) -> Sample:
    """{"input_ids", "labels"}, both [T] int64, of a block of ids [T]. Models shift the labels themselves.

    Args:
        block: [T] ids.
        end_of_text: the token that closes a document. With it there are "position_ids" [T] too, the place of
            each token in its document or in what the block has of it, and the first token of a later document
            is no label: nothing before it foretells it. None: the block is read as one text.
    """
    ids = torch.from_numpy(block.astype(np.int64))
    labels = ids.clone()
    if end_of_text is None:
        return {"input_ids": ids, "labels": labels}
    begins = np.concatenate([[True], block[:-1] == end_of_text])
    labels[torch.from_numpy(begins)[1:].nonzero().squeeze(1) + 1] = IGNORED
    places = np.arange(len(block))
    positions = places - np.maximum.accumulate(np.where(begins, places, 0))
    return {"input_ids": ids, "labels": labels, "position_ids": torch.from_numpy(positions)}


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text, [N] uint16 or uint32, and the number of its UTF-8 bytes."""

    ids: np.ndarray
    num_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; a document's end is a token of no bytes, for the model predicts it too."""
        return self.num_bytes / len(self.ids)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> TokenizedText:
    """The texts joined to one row of tokens, each closed by the end-of-text token."""
    return TokenizedText(encode_documents(tokenizer, texts), sum(len(text.encode()) for text in texts))


class PackedDataset(Dataset[Sample]):
    """`num_samples` training blocks, in epochs that use every token about once.

    An epoch sees the tokens as a ring of N, cut from a random offset on into N // T blocks that do not
    overlap, in random order; fewer than T tokens, other ones each time, are left out. Offset and order
    come from (seed, epoch).

    Args:
        text: N tokens, ends of documents included.
        block_size: T.
        num_samples: length of the dataset; any number of epochs.
        seed: seed of the offsets and orders.
        end_of_text: see `sample_of`.

    Raises:
        ValueError: fewer than T tokens, or a size below 1.
    """

    def __init__(
        self,
        text: TokenizedText,
        block_size: int,
        num_samples: int,
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> None:
        check_positive(block_size=block_size, num_samples=num_samples)
        check_enough(len(text.ids), block_size, "training")
        self.tokens = text.ids
        self.bytes_per_token = text.bytes_per_token
        self.block_size = block_size
        self.num_samples = num_samples
        self.seed = seed
        self.end_of_text = end_of_text

    @property
    def blocks_per_epoch(self) -> int:
        return len(self.tokens) // self.block_size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        """A sample as `sample_of` makes it. Raises IndexError outside 0..num_samples - 1."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, place = divmod(index, self.blocks_per_epoch)
        offset, order = _draw_epoch(self.seed, epoch, len(self.tokens), self.blocks_per_epoch)
        start = (offset + int(order[place]) * self.block_size) % len(self.tokens)
        block = self.tokens[start : start + self.block_size]
        if len(block) < self.block_size:  # around the end of the ring
            block = np.concatenate([block, self.tokens[: self.block_size - len(block)]])
        return sample_of(block, self.end_of_text)


@lru_cache(maxsize=4)
def _draw_epoch(seed: int, epoch: int, num_tokens: int, num_blocks: int) -> tuple[int, np.ndarray]:
    """Offset of the first block and order of the blocks."""
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(num_tokens)), generator.permutation(num_blocks)


class ValidationDataset(Dataset[Sample]):
    """Validation blocks, the same in the same order every time: consecutive, from the first token on.

    With more than `max_blocks` of them it takes that many, evenly spaced, so that a short evaluation
    still sees text from everywhere.

    Args:
        text: N tokens.
        block_size: T.
        max_blocks: limit, or None for all N // T blocks.
        end_of_text: see `sample_of`.

    Raises:
        ValueError: fewer than T tokens, or a size below 1.
    """

    def __init__(
        self,
        text: TokenizedText,
        block_size: int,
        max_blocks: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        check_positive(block_size=block_size, max_blocks=1 if max_blocks is None else max_blocks)
        check_enough(len(text.ids), block_size, "validation")
        self.tokens = text.ids
        self.bytes_per_token = text.bytes_per_token
        self.block_size = block_size
        self.end_of_text = end_of_text
        self.total_blocks = len(text.ids) // block_size
        self.num_blocks = min(self.total_blocks, max_blocks or self.total_blocks)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> Sample:
        """A sample as `sample_of` makes it. Raises IndexError outside 0..len - 1."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        start = index * self.total_blocks // self.num_blocks * self.block_size
        return sample_of(self.tokens[start : start + self.block_size], self.end_of_text)


def check_enough(num_tokens: int, block_size: int, part: str) -> None:
    if num_tokens < block_size:
        raise ValueError(
            f"the {part} text has {num_tokens} tokens, fewer than one block of block_size {block_size}: "
            f"give more text{f', or a block_size of at most {num_tokens}' if num_tokens > 1 else ''}"
        )
