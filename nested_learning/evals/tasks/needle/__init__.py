"""Needles in a haystack, trained on the task itself: whether what was read long ago is still known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Generator

from nested_learning._checks import check_positive
from nested_learning.evals.claims import Ahead, Claim, Kept
from nested_learning.evals.fit import Batch, Training, fit, parameters_of, summary
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import MODELS, Size, TrainedModel
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, Rows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.needle.haystack import KINDS, VOCABULARY, Form, lessons
from nested_learning.evals.tasks.needle.scoring import score
from nested_learning.models import HopeForCausalLM

LONG = "_long"  # ending of the figures at the longest length
# Table 1, in percent, at 4K and at 16K tokens: S-NIAH-1, MK-NIAH-1, MV-NIAH, MQ-NIAH.
_TABLE_1: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "transformer": ((88.6, 79.4, 37.5, 58.9), (79.8, 61.4, 21.5, 29.8)),
    "hope-attention": ((100.0, 80.2, 35.2, 60.4), (100.0, 60.8, 24.8, 30.6)),
    "titans": ((100.0, 26.4, 24.6, 22.8), (100.0, 8.2, 8.2, 9.4)),
    "hope": ((100.0, 29.4, 31.4, 31.7), (100.0, 14.8, 11.4, 14.2)),
}


@dataclass(frozen=True)
class NeedleOptions:
    """Options of the task.

    Args:
        seeds: that are reported.
        width, layers, heads, chunk: of the models; see `Size`.
        needles, letters, digits: of a haystack of several needles, of a key, of a value.
        train_lengths: bytes of training sequences; a run begins with the first and goes on to the next when its
            share of the steps is done.
        batch_bytes: bytes of a training batch: the shorter the sequences, the more of them.
        steps, lr: of the training.
        everything: the loss is that of every byte; false: of the answers alone.
        lengths: bytes of the sequences that are tested, question and answers included.
        rows: test sequences per length and kind of haystack; those of several keys are asked for each of them.
        piece: bytes that are read at once in a test; the state is carried.
        bound: bytes that attention keeps in its cache.
    """

    seeds: int = 5
    width: int = 32
    layers: int = 2
    heads: int = 2
    chunk: int = 32
    needles: int = 4
    letters: int = 1
    digits: int = 3
    train_lengths: list[int] = field(default_factory=lambda: [128, 192, 256])
    batch_bytes: int = 2048
    steps: int = 600
    lr: float = 5e-3
    everything: bool = False
    lengths: list[int] = field(default_factory=lambda: [256, 512, 2048, 8192])
    rows: int = 15
    piece: int = 512
    bound: int = 2048

    def __post_init__(self) -> None:
        check_positive(
            seeds=self.seeds, needles=self.needles, letters=self.letters, digits=self.digits,
            batch_bytes=self.batch_bytes, steps=self.steps, rows=self.rows, piece=self.piece, bound=self.bound,
        )  # fmt: skip
        for name in ("train_lengths", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected one length or more, in bytes")

    @property
    def form(self) -> Form:
        """Sizes of the needles."""
        return Form(self.needles, self.letters, self.digits)


@register_task
class Needle(Task[NeedleOptions]):
    """Exact match of what was hidden, by length and depth, of models trained on short sequences of the kind."""

    name: ClassVar[str] = "needle"
    title: ClassVar[str] = "needles in a haystack: one or several keys, values, queries, by length and depth"
    budgets: ClassVar[Mapping[str, NeedleOptions]] = {
        "smoke": NeedleOptions(
            seeds=1, width=16, layers=1, steps=6, train_lengths=[128], lengths=[128, 512], rows=2, chunk=64
        ),
        "small": NeedleOptions(),
        "full": NeedleOptions(
            width=128, heads=4, letters=4, digits=7, train_lengths=[256, 512, 1024], batch_bytes=16_384,
            steps=10_000, lr=1e-3, lengths=[1024, 2048, 4096, 8192, 16_384, 32_768], rows=100, bound=16_384,
        ),
    }  # fmt: skip
    columns: ClassVar[Mapping[str, str]] = {
        "exact": "exact match, mean of the four kinds, at the shortest length tested",
        "exact_long": "exact match, mean of the four kinds, at the longest length",
        **{kind: f"{kind.replace('_', ' ')}: exact match at the shortest length" for kind in KINDS},
        **{kind + LONG: f"{kind.replace('_', ' ')}: exact match at the longest length" for kind in KINDS},
        "digits": "digits that are right, mean of the four kinds, at the shortest length",
        "digits_long": "digits that are right, mean of the four kinds, at the longest length",
        "loss": "loss of the last tenth of the training, nats per byte asked",
        "parameters": "parameters",
        "seconds": "seconds of a run",
    }
    headline: ClassVar[str] = "exact_long"

    def methods(self) -> Sequence[Method]:
        """Every model that is trained from random weights."""
        return MODELS

    def size(self) -> Size:
        """Size of the models."""
        chosen = self.options
        return Size(
            VOCABULARY, max(chosen.train_lengths), chosen.width, chosen.layers, chosen.heads, chosen.chunk
        )

    def run(self, method: Method, seed: int) -> Figures:
        """Train on short sequences, then ask after long ones have been read in pieces."""
        started = time.perf_counter()
        model = cast(TrainedModel, method).new_model(self.size(), seed)
        training = Training(self.options.steps, self.options.lr, weight_decay=0.01)
        losses = fit(cast(TrainedModel, method), model, self._batches(seed), training)
        last = losses[-max(1, len(losses) // 10) :]
        figures: Figures = {"loss": sum(last) / len(last), "losses": summary(losses)}
        figures.update(self._tested(cast(HopeForCausalLM, model), seed))
        return {**figures, "parameters": parameters_of(model), "seconds": time.perf_counter() - started}

    def _batches(self, seed: int) -> Iterator[Batch]:
        """Training batches; the lengths in turn, from the first to the last."""
        chosen, generator = self.options, Generator().manual_seed(seed)
        for step in range(chosen.steps):
            length = chosen.train_lengths[step * len(chosen.train_lengths) // chosen.steps]
            rows = max(3, chosen.batch_bytes // length)
            yield lessons(rows, length, chosen.form, chosen.everything, generator)

    def _tested(self, model: HopeForCausalLM, seed: int) -> Figures:
        """Figures by length, those of the first and last under names of the table, and the heat map's."""
        chosen = self.options
        figures: Figures = {"lengths": list(chosen.lengths), "heat": {}}
        for length in chosen.lengths:
            generator = Generator().manual_seed(2**40 + 1000 * seed + length)  # none of a training
            found = score(model, length, chosen, generator)
            figures["heat"][str(length)] = found.pop("heat")
            figures.update({f"{name}_at_{length}": value for name, value in found.items()})
            if length == chosen.lengths[0]:
                figures.update(found)
            if length == chosen.lengths[-1]:
                figures.update({name + LONG: value for name, value in found.items()})
        return figures

    def constants(self) -> Mapping[str, Figures]:
        """Random digits, and one value of the haystack whatever is asked."""
        share, digit = 1 / self.options.needles, 0.1
        chance = {kind: digit**self.options.digits for kind in KINDS}
        named = {kind: 1.0 if kind == "single" else share for kind in KINDS}
        rows = {"random digits": _both(chance), "a value of the haystack": _both(named)}
        rows["random digits"].update({"digits": digit, "digits" + LONG: digit})
        return rows

    def claims(self) -> Sequence[Claim]:
        """Claims on Table 1's needles."""
        named = (1 + 3 / self.options.needles) / 4
        source = "Table 1 (S-NIAH-1: Hope 100 at 4K, 8K and 16K)"
        return (
            *(
                Kept(f"(10) a needle is found as well at the longest length: {row}", source, row,
                     "single", "single" + LONG, chance=0.1)
                for row in ("hope", "hope-in-context")
            ),
            Ahead("(10) Hope is ahead of Titans, and Titans of a delta rule, at the longest length",
                  "Table 1 (DeltaNet is not in it; RWKV-7 and Comba, which have a delta rule, are)",
                  "exact" + LONG, ("hope", "titans", "deltanet"), chance=named / 4),
            Ahead("(10) among several keys the Transformer is ahead of Hope inside the training length",
                  "Table 1 (MK-NIAH-1 at 4K: 79.4 and 29.4)", "multi_key", ("transformer", "hope"),
                  chance=1 / self.options.needles / 2),
        )  # fmt: skip

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Table 1's S-NIAH-1, MK-NIAH-1, MV-NIAH and MQ-NIAH at 4K and, as the longest length, 16K."""
        order = ("single", "multi_key", "multi_value", "multi_query")
        return {
            method: {
                kind + ending: value / 100
                for values, ending in zip(lengths, ("", LONG), strict=True)
                for kind, value in zip(order, values, strict=True)
            }
            for method, lengths in _TABLE_1.items()
        }

    def note(self) -> str:
        """What differs from RULER and the paper."""
        chosen = self.options
        return (
            f"Models of width {chosen.width} are trained on the task itself, on bytes, {chosen.steps} steps of "
            f"{chosen.batch_bytes} bytes in sequences of {min(chosen.train_lengths)} to "
            f"{max(chosen.train_lengths)}; the paper's are pretrained language models that are asked in words at "
            f"4K to 16K tokens. Values have {chosen.digits} digits instead of 7, keys {chosen.letters} letter(s) "
            "instead of two words; the haystack is RULER's first kind, repeated sentences; its essays and UUIDs "
            "are left out. Several keys are asked one after the other, each named again. "
            f"{chosen.rows} haystacks per length and kind instead of 500. Attention keeps the last "
            f"{chosen.bound} bytes; its rotary positions are extrapolated as they are."
        )

    def plot(self, rows: Rows, path: Path) -> None:
        """Depth × length heat maps of the exact match, one per method."""
        from nested_learning.evals.tasks.needle.heat import heat_maps

        heat_maps(rows, path)


def _both(figures: Mapping[str, float]) -> dict[str, Any]:
    """Figures of the four kinds, and their mean, at the shortest and the longest length."""
    mean = {"exact": sum(figures.values()) / len(figures)}
    return {name + ending: value for ending in ("", LONG) for name, value in {**mean, **figures}.items()}
