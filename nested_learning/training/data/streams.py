"""Documents read in order, block after block, by the rows of a batch: for training and for scoring.

In training each row of the batch reads document after document, and its block s goes on where its block
s − 1 ended, so that a model can carry its state from one to the next. For scoring, whole documents are read
from their first token on, each from a block of its own.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

from nested_learning._checks import check_positive
from nested_learning.training.data.packing import IGNORED, Sample, TokenizedText, check_enough

DocumentIds = Sequence[np.ndarray]  # ids [n] of each


def documents_of(tokens: np.ndarray, end_of_text: int | None) -> list[np.ndarray]:
    """The documents in a row of tokens [N], each with the end-of-text token that closes it, as views.

    Args:
        tokens: [N] ids.
        end_of_text: the token that closes a document; None: all is one.
    """
    ends = [] if end_of_text is None else (np.flatnonzero(tokens == end_of_text) + 1).tolist()
    bounds = sorted({0, *ends, len(tokens)})
    return [tokens[start:stop] for start, stop in pairwise(bounds)]


def within_blocks(documents: DocumentIds, block_size: int, max_blocks: int | None) -> list[np.ndarray]:
    """As many whole documents, evenly spaced, as `max_blocks` blocks hold; the start of one, if none fits."""
    blocks = np.array([-(-len(document) // block_size) for document in documents])
    if max_blocks is None or blocks.sum() <= max_blocks:
        return list(documents)

    def spaced(count: int) -> np.ndarray:
        return np.arange(count) * len(documents) // count

    low, high = 0, len(documents)
    while high - low > 1:
        count = (low + high) // 2
        low, high = (count, high) if blocks[spaced(count)].sum() <= max_blocks else (low, count)
    if not low:
        return [documents[0][: max_blocks * block_size]]
    return [documents[i] for i in spaced(low)]


def first_tokens(documents: DocumentIds, length: int) -> list[np.ndarray]:
    """The first `length` tokens of each document that has as many. ValueError where none has."""
    kept = [document[:length] for document in documents if len(document) >= length]
    if not kept:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"score_length is {length}, but the longest of the {len(documents)} validation documents has "
            f"{longest} tokens: set --data.score_length to {longest} or less, or hold out more text with "
            "--data.validation_fraction"
        )
    return kept


class CarriedDataset(Dataset[Sample]):
    """`num_samples` training blocks whose states are carried: sample i is block i // R of row i % R.

    Documents in an order drawn from (seed, epoch) go one after the other to the row that has the fewest
    tokens so far. So rows are equally far, every document is read whole, from its first token on, once per
    epoch, and what a row reads does not depend on the length of the run.

    Samples have "input_ids" [T], "position_ids" [T], the true places in the document, "shift_labels" [T]
    (label t is the token after t, also where that is in the next block; a document's first token is none),
    the same as "labels", and "place" [2], the row and the number of the block.

    Args:
        text: N tokens, ends of documents included.
        block_size: T.
        rows: R, sequences of one optimizer step.
        num_samples: length of the dataset, R times the number of steps.
        seed: seed of the orders.
        end_of_text: the token that closes a document. None: the text is one, of which each row reads a piece
            of equal length as a document of its own.

    Raises:
        ValueError: fewer documents than rows, fewer tokens than a block, or a size below 1.
    """

    def __init__(
        self,
        text: TokenizedText,
        block_size: int,
        rows: int,
        num_samples: int,
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> None:
        check_positive(block_size=block_size, rows=rows, num_samples=num_samples)
        check_enough(len(text.ids), block_size, "training")
        self.tokens, self.bytes_per_token = text.ids, text.bytes_per_token
        self.block_size, self.rows, self.num_samples, self.seed = block_size, rows, num_samples, seed
        joined = end_of_text is None
        pieces = np.array_split(text.ids, rows) if joined else documents_of(text.ids, end_of_text)
        self.documents = [piece for piece in pieces if len(piece)]
        if len(self.documents) < rows:
            raise ValueError(
                f"carry_state lets each of {rows} rows read documents of its own, but the training text has "
                f"{len(self.documents)}: set --batch_size to {len(self.documents)} or less, or "
                "--data.documents joined, which cuts the text into as many pieces as there are rows"
            )
        self._numbers: list[list[int]] = [[] for _ in range(rows)]  # of each row its documents,
        self._starts: list[list[int]] = [[] for _ in range(rows)]  # where they begin in it,
        self._ends = [(0, row) for row in range(rows)]  # and how far it goes, as a heap
        self._dealt = 0

    @property
    def blocks_per_epoch(self) -> int:
        return len(self.tokens) // self.block_size

    def fingerprint(self) -> str:
        """sha256 over all that the samples depend on."""
        digest = hashlib.sha256(repr((self.block_size, self.rows, self.seed, self.tokens.dtype.str)).encode())
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        """A sample. Raises IndexError outside 0..num_samples - 1."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        block, row = divmod(index, self.rows)
        ids, positions = self._read(row, block * self.block_size)
        labels = ids[1:].clone()
        labels[positions[1:] == 0] = IGNORED
        return {
            "input_ids": ids[:-1],
            "labels": labels,  # for those who count them before the step
            "shift_labels": labels,
            "position_ids": positions[:-1],
            "place": torch.tensor([row, block]),
        }

    def _read(self, row: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and positions [T + 1] of what a row reads from its token `start` on."""
        stop = start + self.block_size + 1
        self._deal(stop)
        ids, positions = [], []
        place = bisect_right(self._starts[row], start) - 1
        while start < stop:
            document = self.documents[self._numbers[row][place]]
            inside = start - self._starts[row][place]
            piece = document[inside : inside + stop - start]
            ids.append(piece.astype(np.int64))
            positions.append(np.arange(inside, inside + len(piece)))
            start, place = start + len(piece), place + 1
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(positions))

    def _deal(self, length: int) -> None:
        """Give documents to rows until each has `length` tokens."""
        while self._ends[0][0] < length:
            epoch, place = divmod(self._dealt, len(self.documents))
            if not place:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            end, row = self._ends[0]
            number = int(self._order[place])
            self._numbers[row].append(number)
            self._starts[row].append(end)
            heapq.heapreplace(self._ends, (end + len(self.documents[number]), row))
            self._dealt += 1


class DocumentBlocks(Dataset[Sample]):
    """Whole documents in rows, each from a block of its own on; an iteration gives one block of all rows.

    The longest documents come first, each in the row with the fewest blocks. A batch has the rows that have
    not ended, [n, T], one at least: of padding where a process has none left, as all take part in every step.

    An item has "input_ids", "shift_labels", "position_ids" and, where there is padding, "attention_mask".

    Args:
        documents: ids of each document.
        block_size: T.
        rows: rows of all processes together.
        index, processes: the process and the number of them, each of which reads every so many rows.
    """

    def __init__(
        self, documents: DocumentIds, block_size: int, rows: int, index: int = 0, processes: int = 1
    ) -> None:
        self.documents, self.block_size = documents, block_size
        rows = max(1, min(rows, len(documents)))  # others would have nothing to read, and cost memory
        blocks = [-(-len(document) // block_size) for document in documents]
        self.num_blocks = sum(blocks)
        ends = [(0, row) for row in range(rows)]
        reads: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        for number in sorted(range(len(documents)), key=lambda number: -blocks[number]):
            end, row = ends[0]
            reads[row] += [(number, k) for k in range(blocks[number])]
            heapq.heapreplace(ends, (end + blocks[number], row))
        reads.sort(key=len, reverse=True)
        self.steps = len(reads[0])
        self._reads = reads[index::processes]

    def __len__(self) -> int:
        return self.num_blocks

    def __iter__(self) -> Iterator[Sample]:
        for step in range(self.steps):
            yield self._batch([read[step] for read in self._reads if step < len(read)])

    def _batch(self, reads: list[tuple[int, int]]) -> Sample:
        """The blocks (document, number of the block) of one step."""
        T = self.block_size
        ids, labels = np.zeros((2, max(len(reads), 1), T), np.int64)
        labels[:] = IGNORED
        positions = np.tile(np.arange(T), (len(ids), 1))
        real = np.zeros(ids.shape, bool)
        for row, (number, k) in enumerate(reads):
            document = self.documents[number]
            piece, following = document[k * T : (k + 1) * T], document[k * T + 1 : (k + 1) * T + 1]
            ids[row, : len(piece)], labels[row, : len(following)] = piece, following
            positions[row] += k * T
            real[row, : len(piece)] = True
        batch = {"input_ids": ids, "shift_labels": labels, "position_ids": positions}
        if not real.all():
            batch["attention_mask"] = real
        return {name: torch.from_numpy(value) for name, value in batch.items()}
