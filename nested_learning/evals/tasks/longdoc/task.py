"""Long documents that the model cannot have read, scored while they are learned: bits per byte.

Each document is read from the base model, and each token is scored before it is learned. A run is one
document: its number is the seed, so that verdicts are paired by document. Settings are chosen on documents
that are not reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import Base, PretrainedMethod, Teaching, load_base
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.of_pretrained import OfPretrained
from nested_learning.evals.registry import register_method, register_task
from nested_learning.evals.report.figures import lines
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.longdoc.documents import (
    LONG,
    SHORT,
    TUNING,
    UnreadDocument,
    documents_of,
    listed,
)
from nested_learning.evals.tasks.longdoc.readers import (
    AVERAGED,
    AVERAGED_WHOLE,
    DYNAMIC,
    DYNAMIC_RMS,
    DYNAMIC_WHOLE,
    LORA,
    ONE_LEVEL,
    ONE_LEVEL_WHOLE,
    READERS,
    STARTED,
    WINDOW,
    WINDOW_WHOLE,
    DocumentReader,
)

BITS, LONG_BITS, LONG_LAST = "bits per byte", "long", "long, last quarter"
QUARTERS = tuple(f"quarter {n}" for n in (1, 2, 3, 4))
BY_NAME = {each.method.name: each for each in READERS}
TARGET, AHEAD_BY = 0.02, 0.005  # bits per byte

for _reader in READERS:
    register_method(_reader.method)


@dataclass(frozen=True)
class LongdocOptions:
    """Documents and windows in which they are read.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        documents: folder of text files, of which the first by name tune, the next are short, the next long;
            empty: the manifest of files of pinned packages; "made-up": none is needed.
        short, long, tuning: numbers of documents; short and long ones are reported.
        tokens, long_tokens: tokens that are read of them, at most.
        tuning_tokens: tokens that are read of a document for tuning to choose a setting, at most.
        skip_absent: a missing or changed file is passed over, where the manifest has others, and named;
            else the task is refused. Finished runs do not notice if more are missing later.
        windows: positions of the three windows.
        stride: tokens by which the first two windows advance: what is left of them is read again.
        whole_stride: tokens by which the third one advances.
        chunks: tokens between two writes of levels, fast to slow; fine-tuning and LoRA take steps of the
            first.
        rates: how many settings of each method are tried.
    """

    model: str = PACKAGED
    documents: str = ""
    short: int = SHORT
    long: int = LONG
    tuning: int = TUNING
    tokens: int = 8192
    long_tokens: int = 32_768
    tuning_tokens: int = 4096
    skip_absent: bool = False
    windows: tuple[int, int, int] = (1024, 2048, 8192)
    stride: int = 512
    whole_stride: int = 4096
    chunks: tuple[int, int, int] = (256, 1024, 4096)
    rates: int = 3

    @property
    def seeds(self) -> int:
        """Reported runs: one of each document."""
        return self.short + self.long


def bits_of(text: str, count: int, base: Base) -> tuple[Tensor, Tensor]:
    """Ids [T] of the first `count` tokens of a text, at most, and the bytes [T] that each adds.

    Raises:
        ValueError: fewer than two tokens.
    """
    encoded = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:count], encoded["offset_mapping"][:count]
    if len(ids) < 2:
        raise ValueError(f"a document needs at least two tokens, got {len(ids)}")
    read, before = [], 0
    for _, end in offsets:  # a character of several tokens counts with the first of them
        read.append(len(text[before:end].encode()))
        before = max(before, end)
    return torch.tensor(ids), torch.tensor(read)


def bits_per_byte(losses: Tensor, read: Tensor) -> float | None:
    """Bits per byte of tokens with these losses [n] (nats) and bytes [n], those without a loss left out."""
    scored = ~losses.isnan()
    total = float(losses[scored].double().sum()) / math.log(2) / max(int(read[scored].sum()), 1)
    return total if math.isfinite(total) else None


def figures_of(document: UnreadDocument, losses: Tensor, read: Tensor) -> Figures:
    """The figures of a document: overall and by quarter, under the names of its part and kind."""
    whole = bits_per_byte(losses, read)
    quarters = [
        bits_per_byte(*each) for each in zip(losses.tensor_split(4), read.tensor_split(4), strict=True)
    ]
    figures: Figures = {BITS: whole, document.kind: whole, "document": document.name}
    if document.part == "long":
        return {**figures, LONG_BITS: whole, LONG_LAST: quarters[-1]}
    return {**figures, **dict(zip(QUARTERS, quarters, strict=True))}


@register_task
class LongdocTask(OfPretrained[LongdocOptions]):
    """Long documents are read, and each token is scored before it is learned."""

    name = "longdoc"
    title = "long documents that the model cannot have read, scored while they are learned: bits per byte"
    budgets: ClassVar[Mapping[str, LongdocOptions]] = {
        "smoke": LongdocOptions(
            model=RANDOM,
            short=2,
            long=1,
            tuning=1,
            tokens=256,
            long_tokens=512,
            tuning_tokens=128,
            skip_absent=True,
            windows=(64, 128, 256),
            stride=32,
            whole_stride=128,
            chunks=(16, 32, 64),  # four of the first in the shortest window, which distilling needs
            rates=1,
        ),
        "small": LongdocOptions(),
        "full": LongdocOptions(),
    }
    columns: ClassVar[Mapping[str, str]] = {
        BITS: "of all documents",
        **{name: f"of the short documents, {name} of their tokens" for name in QUARTERS},
        LONG_BITS: "bits per byte of the long documents",
        LONG_LAST: "of the long documents, the last quarter of their tokens",
        "source": "bits per byte of sources",
        "tests": "bits per byte of tests",
        "docs": "bits per byte of docs",
        "seconds": "of a document",
    }
    headline = BITS
    higher_is_better = False
    chosen = tuple(each.method for each in READERS)

    def unfit(self, method: PretrainedMethod) -> str | None:
        if method.name in BY_NAME:
            return None
        return f"{method.name!r} has no window to read a document in; {self.name} takes {sorted(BY_NAME)}"

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        return BY_NAME[method.name].grid[: self.options.rates]

    def missing(self) -> str | None:
        if (problem := super().missing()) is not None:
            return problem
        try:
            found, absent = self.documents()
        except ValueError as error:
            return str(error)
        wanted = self.options.seeds + self.options.tuning
        if len(found) == wanted and (self.options.skip_absent or not absent):
            return None
        return (
            f"{len(found)} of {wanted} documents are here: {'; '.join(absent)}. Install the packages of "
            "requirements.lock, or name a folder of your own by the option `documents`; with "
            "skip_absent=true and fewer documents (short, long, tuning) the others are read"
        )

    def documents(self) -> tuple[list[UnreadDocument], list[str]]:
        """Documents that are here, in the order of the seeds and then those for tuning; what others lack.

        Raises:
            ValueError: as `documents_of`.
        """
        options = self.options
        counts = (options.short, options.long, options.tuning)
        given = documents_of(options.documents, counts)
        kept: list[UnreadDocument] = []
        absent: list[str] = []
        for part, count in zip(("short", "long", "tuning"), counts, strict=True):
            of_part = [(each, each.problem()) for each in given if each.part == part]
            if not options.skip_absent:
                of_part = of_part[:count]
            kept += [each for each, problem in of_part if problem is None][:count]
            absent += [problem for _, problem in of_part if problem is not None]
        return kept, absent

    def teaching(self, reader: DocumentReader) -> Teaching:
        """Circumstances of a reader: its window, and how much of it is read again."""
        positions = self.options.windows[reader.window]
        whole = reader.window == len(self.options.windows) - 1
        stride = self.options.whole_stride if whole else self.options.stride
        kept = positions - stride if reader.read_again is None else int(reader.read_again * positions)
        reading = (positions, kept)
        return Teaching(self.chunks, positions, rule="adam", alone=False, clip=1.0, reading=reading)

    def _practice(self) -> list[list[int]]:
        """Ids of the documents for tuning."""
        base, tuning = load_base(self.options.model), self.documents()[0][self.options.seeds :]
        return [bits_of(each.text(), self.options.tokens, base)[0].tolist() for each in tuning]

    def run(self, method: Method, seed: int) -> Figures:
        found = self.documents()[0][: self.options.seeds]
        if not 0 <= seed < len(found):
            raise ValueError(f"seed {seed} is the number of a document; expected 0 to {len(found) - 1}")
        return self.read(method, found[seed], seed, self._length(found[seed]))

    def tune(self, method: Method, seed: int) -> Figures:
        """The mean of the documents for tuning."""
        tuning, count = self.documents()[0][self.options.seeds :], self.options.tuning_tokens
        found = [self.read(method, each, seed, count)[BITS] for each in tuning]
        return {BITS: None if None in found else fmean(found)}

    def _length(self, document: UnreadDocument) -> int:
        """Tokens that are read of a reported document, at most."""
        return self.options.long_tokens if document.part == "long" else self.options.tokens

    def read(self, method: Method, document: UnreadDocument, seed: int, count: int) -> Figures:
        """Figures of a method on the first `count` tokens of a document, read from the base model."""
        assert isinstance(method, PretrainedMethod)
        base = load_base(self.options.model)
        ids, read = bits_of(document.text(), count, base)
        reader = BY_NAME[method.name]
        teaching = self.teaching(reader)
        if reader.practises:
            teaching = replace(teaching, practice=self._practice())
        with method.open(base, teaching, seed) as student:
            start = time.perf_counter()
            losses = student.read(ids)
            seconds = time.perf_counter() - start
        figures = figures_of(document, losses, read)
        return {**figures, "tokens": len(ids), "seconds": seconds, "parameters": base.parameters}

    def constants(self) -> Mapping[str, Figures]:
        return {"any byte alike": {BITS: 8.0}}

    def claims(self) -> Sequence[Claim]:
        def below(text: str, better: DocumentReader, worse: DocumentReader, margin: float) -> Ahead:
            order = (better.method.name, worse.method.name)
            return Ahead(text, "ours", BITS, order, higher=False, margin=margin, unit="documents")

        first, _, last = (f"{each:,}" for each in self.options.windows)
        found: list[Claim] = []
        for words, levels, whole in (
            ("one level", ONE_LEVEL, ONE_LEVEL_WHOLE),
            ("levels with an average", AVERAGED, AVERAGED_WHOLE),
        ):
            for reader, alone, dynamic, size in (
                (levels, WINDOW, DYNAMIC, first),
                (whole, WINDOW_WHOLE, DYNAMIC_WHOLE, last),
            ):
                text = (
                    f"{words} in a window of {size} takes {TARGET} bits per byte less than the window alone"
                )
                found.append(below(text, reader, alone, TARGET))
                text = f"{words} in a window of {size} takes {AHEAD_BY} less than dynamic evaluation by SGD"
                found.append(below(text, reader, dynamic, AHEAD_BY))
        for words, levels in (("one level", ONE_LEVEL), ("levels with an average", AVERAGED)):
            text = f"{words} in a window of {first} takes {AHEAD_BY} less than dynamic evaluation by RMS"
            found.append(below(text, levels, DYNAMIC_RMS, AHEAD_BY))
        found.append(below(f"one level in a window of {last} takes less than the window of {first} with one",
                           ONE_LEVEL_WHOLE, ONE_LEVEL, 0.0))  # fmt: skip
        found.append(below("one level takes less than LoRA in the same window", ONE_LEVEL, LORA, 0.0))
        text = "one level with learned rates and starts takes less than one without"
        found.append(below(text, STARTED, ONE_LEVEL, 0.0))
        return found

    def note(self) -> str:
        options = self.options
        try:
            found, absent = self.documents()
        except ValueError as error:
            return str(error)
        text = (
            f"{listed(found[: options.seeds])}; {options.tokens:,} tokens of the short ones, "
            f"{options.long_tokens:,} of the {options.long} long ones, at most; settings are chosen on "
            f"{options.tuning_tokens:,} tokens of each of {options.tuning} others. Windows of "
            f"{options.windows[0]:,} and {options.windows[1]:,} advance by {options.stride:,} tokens, that "
            f"of {options.windows[2]:,} by {options.whole_stride:,}. The "
            "seed is the number of the document."
        )
        return " ".join([text, *(f"Passed over: {problem}." for problem in absent), *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Bits per byte of the short documents by quarter."""
        drawn = {name: row for name, row in rows.items() if row.values(QUARTERS[0])}
        places = [(n + 1.0, name) for n, name in enumerate(QUARTERS)]
        lines(drawn, places, ("quarter of the document", BITS), path)
