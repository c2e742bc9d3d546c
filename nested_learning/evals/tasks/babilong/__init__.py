"""BABILong's first three tasks: facts of a small world, hidden in a long text and asked for at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Generator

from nested_learning.evals.by_length import LONG, ByLength, LengthOptions, at_any_length, table_columns
from nested_learning.evals.carried import CarriedReader
from nested_learning.evals.claims import Ahead, Claim, Keeps
from nested_learning.evals.fit import TaskBatch
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.babilong.mixing import Mixer, text_here, texts
from nested_learning.evals.tasks.babilong.world import PLACES, TASKS, Chance, story

SHORTEST = 32  # words of a sequence that has room for a story
_STORIES = 500  # from which the row of the place named last is counted


@dataclass(frozen=True)
class BabilongOptions(LengthOptions):
    """Options of the task; tokens are words.

    Args:
        text: source of the noise; by default tinyshakespeare where NESTED_LEARNING_DATA holds it, otherwise
            the standard library's text.
        vocabulary: words that have an id.
    """

    train_lengths: list[int] = field(default_factory=lambda: [64, 128, 256])
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    rows: int = 25
    text: str = field(default_factory=text_here)
    vocabulary: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_lengths", "lengths"):
            if min(getattr(self, name)) < SHORTEST:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {SHORTEST} words or more")


@register_task
class Babilong(ByLength[BabilongOptions]):
    """Accuracy of answers about facts in a long text, by length, of models trained on short ones."""

    name: ClassVar[str] = "babilong"
    title: ClassVar[str] = "BABILong qa1-qa3: where people and things are, told in a long text"
    budgets: ClassVar[Mapping[str, BabilongOptions]] = {
        "smoke": BabilongOptions(
            seeds=1, width=16, layers=1, steps=6, vocabulary=128, train_lengths=[64], lengths=[64, 512],
            rows=4,
        ),
        "small": BabilongOptions(steps=2000, lr_factors=[0.4, 1.0]),
        "full": BabilongOptions(
            width=128, heads=4, vocabulary=8192, batch_tokens=16_384, train_lengths=[64, 128, 256, 512, 1024],
            steps=20_000, lr=1e-3, lr_factors=[0.5, 1.0, 2.0], tuning_seeds=3,
            lengths=[256, 1024, 4096, 16_384, 65_536], rows=100, bound=16_384,
        ),
    }  # fmt: skip
    kinds: ClassVar[tuple[str, ...]] = TASKS
    columns: ClassVar[Mapping[str, str]] = table_columns(TASKS, "answer")

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return self.options.vocabulary

    def lessons(self, rows: int, length: int, generator: Generator) -> TaskBatch:
        """Stories in noise with questions where bAbI has them."""
        found = texts(self.options.text, self.options.vocabulary)
        return Mixer(found.ids, found.train, generator).lessons(rows, length)

    def score(self, reader: CarriedReader, length: int, generator: Generator) -> Figures:
        """Share of right answers of each task."""
        found = texts(self.options.text, self.options.vocabulary)
        mixer, right = Mixer(found.ids, found.test, generator), {}
        for task in TASKS:
            ids, answers = mixer.tests(task, self.options.rows, length)
            right[task] = float((reader.anew().read(ids)[:, 0] == answers).double().mean())
        return right

    def constants(self) -> Mapping[str, Figures]:
        """One of six places at random, and the place that the story named last."""
        return {
            "a random place": at_any_length({task: 1 / len(PLACES) for task in TASKS}),
            "the place named last": at_any_length({task: _named_last(task) for task in TASKS}),
        }

    def claims(self) -> Sequence[Claim]:
        """Claims on Figure 9."""
        chance = self.constants()["the place named last"]["exact"]
        return (
            *(
                Keeps(f"(10) BABILong is answered as well at the longest length: {row}",
                     "Figure 9 (Hope keeps its accuracy to 10M tokens)", row, "exact", "exact" + LONG,
                     margin=0.05, chance=chance)
                for row in ("hope", "hope-in-context")
            ),
            Ahead("(10) BABILong: Hope is ahead of Titans, and Titans of a delta rule, at the longest length",
                  "Figure 9 (DeltaNet is not in it)", "exact" + LONG, ("hope", "titans", "deltanet"),
                  chance=1 / len(PLACES)),
        )  # fmt: skip

    def note(self) -> str:
        """Differences from BABILong and from the paper."""
        chosen = self.options
        return (
            f"Models of width {chosen.width} are trained on the tasks alone, {chosen.steps} steps of "
            f"{chosen.batch_tokens} words in sequences of {min(chosen.train_lengths)} to "
            f"{max(chosen.train_lengths)}; the paper fine-tunes pretrained models and asks at up to 10M "
            f"tokens. The stories are drawn from a simulation of bAbI's world, the noise is {chosen.text} "
            f"instead of PG19, a token is one of {chosen.vocabulary} words. qa4 and qa5 are left out. "
            f"{chosen.rows} sequences per length and task instead of 100. {chosen.tuning_note()} Attention "
            f"keeps the last {chosen.bound} words; its rotary positions are extrapolated as they are."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Mean accuracy of the three tasks by length."""
        from nested_learning.evals.report.figures import lines

        points = [(float(length), f"exact_at_{length}") for length in self.options.lengths]
        lines(rows, points, ("words", "answers that are right"), path, log=True)


def _named_last(task: str) -> float:
    """Share of answers that are the place named last, the one in the question left out."""
    chance, right, asked = Chance(Generator().manual_seed(0)), 0, 0
    for _ in range(_STORIES):
        drawn = story(task, chance)
        for question in drawn.questions:
            named = [word for fact in drawn.facts[: question.after] for word in fact if word in PLACES]
            others = [place for place in named if place not in question.words]
            right += bool(others) and others[-1] == question.answer
            asked += 1
    return right / asked
