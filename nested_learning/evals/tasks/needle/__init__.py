"""Needles in a haystack, trained on the task itself: whether what was read long ago is still known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Generator

from nested_learning._checks import check_positive
from nested_learning.evals.by_length import LONG, ByLength, LengthOptions, at_any_length, table_columns
from nested_learning.evals.carried import CarriedReader
from nested_learning.evals.claims import Ahead, Claim, Keeps
from nested_learning.evals.fit import TaskBatch
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.needle.haystack import KINDS, VOCABULARY, NeedleForm, lessons
from nested_learning.evals.tasks.needle.scoring import score

# Table 1, in percent, at 4K and at 16K tokens: S-NIAH-1, MK-NIAH-1, MV-NIAH, MQ-NIAH, in the order of KINDS.
_TABLE_1: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "transformer": ((88.6, 79.4, 37.5, 58.9), (79.8, 61.4, 21.5, 29.8)),
    "titans": ((100.0, 26.4, 24.6, 22.8), (100.0, 8.2, 8.2, 9.4)),
    "hope": ((100.0, 29.4, 31.4, 31.7), (100.0, 14.8, 11.4, 14.2)),
    "hope-attention": ((100.0, 80.2, 35.2, 60.4), (100.0, 60.8, 24.8, 30.6)),
}


@dataclass(frozen=True)
class NeedleOptions(LengthOptions):
    """Options of the task; tokens are bytes.

    Args:
        needles, letters, digits: of a haystack of several needles, of a key, of a value.
        everything: the loss is that of every byte; false: of the answers alone.
    """

    needles: int = 4
    letters: int = 1
    digits: int = 3
    everything: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(needles=self.needles, letters=self.letters, digits=self.digits)

    @property
    def form(self) -> NeedleForm:
        """Sizes of the needles."""
        return NeedleForm(self.needles, self.letters, self.digits)


@register_task
class Needle(ByLength[NeedleOptions]):
    """Exact match of what was hidden, by length and depth, of models trained on short sequences."""

    name: ClassVar[str] = "needle"
    title: ClassVar[str] = "needles in a haystack: one or several keys, values, queries, by length and depth"
    budgets: ClassVar[Mapping[str, NeedleOptions]] = {
        "smoke": NeedleOptions(
            seeds=1, width=16, layers=1, steps=6, train_lengths=[128], lengths=[128, 512], rows=2
        ),
        "small": NeedleOptions(steps=1500, lr_factors=[0.4, 1.0, 2.0]),
        "full": NeedleOptions(
            width=128, heads=4, letters=4, digits=7, train_lengths=[256, 256, 512, 1024], batch_tokens=16_384,
            steps=10_000, lr=1e-3, lr_factors=[0.5, 1.0, 2.0], tuning_seeds=3,
            lengths=[1024, 2048, 4096, 8192, 16_384, 32_768], rows=100, bound=16_384,
        ),
    }  # fmt: skip
    kinds: ClassVar[tuple[str, ...]] = KINDS
    columns: ClassVar[Mapping[str, str]] = {
        **table_columns(KINDS, "byte"),
        "digits": "digits that are right, mean of all kinds, at the shortest length",
        "digits_long": "digits that are right, mean of all kinds, at the longest length",
    }

    @property
    def vocab_size(self) -> int:
        """Number of bytes."""
        return VOCABULARY

    def lessons(self, rows: int, length: int, generator: Generator) -> TaskBatch:
        """Sequences with questions at several places."""
        return lessons(rows, length, self.options.form, self.options.everything, generator)

    def score(self, reader: CarriedReader, length: int, generator: Generator) -> Figures:
        """Exact match of each kind, right digits, and exact match by depth."""
        return score(reader, length, self.options.rows, self.options.form, generator)

    def constants(self) -> Mapping[str, Figures]:
        """Random digits, and one value of the haystack whatever is asked."""
        digit, share = 0.1, 1 / self.options.needles
        chance = at_any_length(dict.fromkeys(KINDS, digit**self.options.digits))
        return {
            "random digits": {**chance, "digits": digit, "digits" + LONG: digit},
            "a value of the haystack": at_any_length({**dict.fromkeys(KINDS, share), "single": 1.0}),
        }

    def claims(self) -> Sequence[Claim]:
        """Claims on Table 1's needles."""
        guessed = 0.1**self.options.digits
        return (
            *(
                Keeps(
                    f"(10) a needle is found as well at the longest length: {row}",
                    "Table 1 (S-NIAH-1, Hope: 100 at 4K, 8K and 16K)",
                    row, "single", "single" + LONG, chance=0.1,
                )
                for row in ("hope", "hope-in-context")
            ),
            Ahead(
                "(10) Hope is ahead of Titans, and Titans of a delta rule, at the longest length",
                "Table 1 (16K; DeltaNet is not in it, RWKV-7 and Comba have a delta rule)",
                "exact" + LONG, ("hope", "titans", "deltanet"), chance=guessed,
            ),
            Ahead(
                "(10) among several keys the Transformer is ahead of Hope inside the training length",
                "Table 1 (MK-NIAH-1 at 4K: 79.4 and 29.4)",
                "multi_key", ("transformer", "hope"), chance=guessed,
            ),
        )  # fmt: skip

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Table 1's S-NIAH-1, MK-NIAH-1, MV-NIAH and MQ-NIAH at 4K and, as the longest length, at 16K."""
        return {
            method: {
                kind + end: value / 100
                for end, values in zip(("", LONG), lengths, strict=True)
                for kind, value in zip(KINDS, values, strict=True)
            }
            for method, lengths in _TABLE_1.items()
        }

    def note(self) -> str:
        """Differences from RULER and from the paper."""
        chosen = self.options
        return (
            f"Models of width {chosen.width} are trained on the task itself, on bytes, {chosen.steps} steps "
            f"of {chosen.batch_tokens} in sequences of {min(chosen.train_lengths)} to "
            f"{max(chosen.train_lengths)}; the paper's are pretrained language models that are asked in "
            f"words at 4K to 16K tokens. Values have {chosen.digits} digits instead of 7, keys "
            f"{chosen.letters} letter(s) instead of two words; the haystack is RULER's first kind, repeated "
            "sentences: its essays and UUIDs are left out. Several keys are asked one after the other, each "
            f"named again. {chosen.rows} haystacks per length and kind instead of 500. "
            f"{chosen.tuning_note()} Attention keeps the last {chosen.bound} bytes; its rotary positions are "
            "extrapolated as they are."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Depth × length heat maps of the exact match, one per method."""
        from nested_learning.evals.tasks.needle.heat import heat_maps

        heat_maps(rows, path)
