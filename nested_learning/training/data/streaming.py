"""Text streamed from a `datasets` source, packed on the way into blocks, resumable at the exact block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from nested_learning._checks import check_positive
from nested_learning.training.data.download import DownloadError
from nested_learning.training.data.packing import Sample, sample_of
from nested_learning.training.data.tokenizers import encode_documents


class TextStream:
    """The non-empty texts of a streamed dataset. One iteration at a time; its place is a small dictionary.

    Args:
        rows: the dataset; its own `state_dict` finds a place again without reading all before it.
        column: the column that holds the text.
        name: name of the source, for messages.
    """

    def __init__(self, rows: datasets.IterableDataset, column: str, name: str) -> None:
        self.rows = rows
        self.column = column
        self.name = name
        self._beginning = rows.state_dict()

    def once(self) -> Iterator[str]:
        """One pass from the first row on. Raises ValueError where the column is missing or holds no text."""
        self.rows.load_state_dict(self._beginning)
        yield from self._texts()

    def endless(self, state: dict[str, Any] | None = None) -> Iterator[str]:
        """Pass after pass, from the first row or from where `state` was taken.

        Raises ValueError where the column is missing or holds no text, and if a whole pass has none.
        """
        if state is not None:
            self.rows.load_state_dict(state)
            yield from self._texts()
        while True:
            empty = True
            for text in self.once():
                empty = False
                yield text
            if empty:
                raise ValueError(
                    f"{self.name} has no text in column {self.column!r} to train on, beside what is held out "
                    "for validation; choose another data set or column, or hold out less"
                )

    def state_dict(self) -> dict[str, Any]:
        """The place behind the text that was given out last."""
        return self.rows.state_dict()

    def _texts(self) -> Iterator[str]:
        for row in self.rows:
            text = row.get(self.column)
            if not isinstance(text, str):
                found = f"holds a {type(text).__name__}" if self.column in row else "does not exist"
                raise ValueError(
                    f"text column {self.column!r} of {self.name} {found}; its columns are "
                    f"{', '.join(sorted(row))}: choose the one with the text by text_column"
                )
            if text:
                yield text


class StreamedDataset(IterableDataset[Sample]):
    """`num_samples` training blocks from a stream that need not fit into memory.

    Texts are joined end to end, each closed by its end-of-text token, and cut into blocks of T. Windows of
    `shuffle_blocks` consecutive blocks are shuffled by (seed, window), so block i is a function of the
    stream, the seed and i, and a state needs no copy of the shuffled blocks. Short streams are repeated.

    Give it to one process that deals out (accelerate's dispatcher), or to accelerate's shards, each of
    which reads the whole stream and keeps its part. A DataLoader may have no more than one worker.

    Args:
        stream: the texts.
        tokenizer: a tokenizer with an end-of-text token.
        block_size: T.
        num_samples: blocks of one full iteration.
        seed: seed of the shuffle.
        shuffle_blocks: blocks per window; 1 keeps the order of the stream.
        end_of_text: see `sample_of`.
    """

    def __init__(
        self,
        stream: TextStream,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        num_samples: int,
        seed: int = 0,
        shuffle_blocks: int = 1024,
        end_of_text: int | None = None,
    ) -> None:
        check_positive(block_size=block_size, num_samples=num_samples, shuffle_blocks=shuffle_blocks)
        self.stream = stream
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle_blocks = shuffle_blocks
        self.end_of_text = end_of_text
        self._begin = self._fresh_state()
        self._now = self._begin
        self._num_bytes = 0
        self._num_tokens = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the text read so far. Raises ValueError before the first block."""
        if not self._num_tokens:
            raise ValueError("bytes_per_token of a stream is known once a block has been read")
        return self._num_bytes / self._num_tokens

    def state_dict(self) -> dict[str, Any]:
        """The place of the running iteration: plain numbers, lists and dictionaries, fit for JSON."""
        return dict(self._now)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on behind the block after which `state` was taken.

        Raises:
            ValueError: the state is of a dataset with another block size, window or seed.
        """
        for name in ("block_size", "seed", "shuffle_blocks"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"this state was taken with {name} {state.get(name)}, the dataset has "
                    f"{getattr(self, name)}; resume with the settings of the first run"
                )
        self._begin = self._now = dict(state)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a stream is packed in one place, got {worker.num_workers} workers: "
                "set dataloader_num_workers to 0 or 1"
            )
        state, self._begin = self._begin, self._fresh_state()  # the iteration after a resumed one is whole
        texts = self.stream.endless(state["stream"])
        while (first := state["window"] * self.shuffle_blocks) < self.num_samples:
            blocks, rest = self._next_window(texts, np.array(state["rest"], np.int64))
            order = np.random.default_rng([self.seed, state["window"]]).permutation(self.shuffle_blocks)
            for place in range(state["place"], min(self.shuffle_blocks, self.num_samples - first)):
                self._now = state | {"place": place + 1}
                yield sample_of(blocks[order[place]], self.end_of_text)
            state = state | {
                "window": state["window"] + 1,
                "place": 0,
                "stream": self.stream.state_dict(),
                "rest": rest.tolist(),
            }

    def _next_window(self, texts: Iterator[str], rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks [shuffle_blocks, T] from the tokens at hand and the next texts, and the tokens left over."""
        needed = self.shuffle_blocks * self.block_size
        parts, have = [rest], len(rest)
        while have < needed:
            text = next(texts)
            parts.append(encode_documents(self.tokenizer, [text]).astype(np.int64))
            have += len(parts[-1])
            self._num_bytes += len(text.encode())
            self._num_tokens += len(parts[-1])
        tokens = np.concatenate(parts)
        return tokens[:needed].reshape(self.shuffle_blocks, self.block_size), tokens[needed:]

    def _fresh_state(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "seed": self.seed,
            "shuffle_blocks": self.shuffle_blocks,
            "window": 0,
            "place": 0,  # blocks of the window that were given out
            "stream": None,  # where the stream stood before the window; None is its beginning
            "rest": [],  # tokens read by then that belong to the window
        }


def open_stream(source: str, column: str, num_held_out: int) -> tuple[TextStream, Iterator[str]]:
    """A `datasets` source for training, and the texts held out for validation, as a stream too.

    Args:
        source: "hf:NAME" or "hf:NAME:CONFIG"; NAME is whatever `datasets.load_dataset` takes.
        column: the column that holds the text.
        num_held_out: rows kept from the start of the train split where there is no validation split.

    Raises:
        ValueError: no such data set or configuration, no network, no train split.
    """
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"{source!r} names no data set: expected hf:NAME or hf:NAME:CONFIG")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # the library raises a dozen kinds, from its own to OSError
        raise DownloadError(
            f"could not open {source!r} ({type(error).__name__}: {error}). Check the name and the network, "
            "or give a text of your own with --data PATH."
        ) from error
    if "train" not in splits:
        raise ValueError(f"{source!r} has no split 'train'; it has {', '.join(map(repr, splits))}")
    rows = splits["train"]
    if "validation" in splits:
        return TextStream(rows, column, source), TextStream(splits["validation"], column, source).once()
    held_out = TextStream(rows.take(num_held_out), column, source)
    return TextStream(rows.skip(num_held_out), column, source), held_out.once()
