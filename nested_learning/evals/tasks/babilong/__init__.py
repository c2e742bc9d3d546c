"""BABILong's first three tasks: facts of a small world, hidden in a long text and asked for at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Generator

from nested_learning._checks import check_positive
from nested_learning.evals.carried import Reader
from nested_learning.evals.claims import Ahead, Claim, Kept
from nested_learning.evals.fit import Batch, Training, fit, parameters_of, summary
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import MODELS, Size, TrainedModel
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, Rows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.babilong.mixing import Mixer, text_here, texts
from nested_learning.evals.tasks.babilong.world import PLACES, TASKS, Chance, story
from nested_learning.models import HopeForCausalLM

LONG = "_long"  # ending of the figures at the longest length
_STORIES = 500  # from which the rows without a run are counted


@dataclass(frozen=True)
class BabilongOptions:
    """Options of the task.

    Args:
        seeds: that are reported.
        width, layers, heads, chunk: of the models; see `Size`.
        text: source of the noise; by default tinyshakespeare where NESTED_LEARNING_DATA holds it, otherwise the
            standard library's text.
        vocabulary: words that have an id.
        train_lengths: words of training sequences; a run begins with the first and goes on to the next when its
            share of the steps is done.
        batch_words: words of a training batch: the shorter the sequences, the more of them.
        steps, lr: of the training.
        lengths: words of the sequences that are tested.
        rows: test sequences per length and task.
        piece: words that are read at once in a test; the state is carried.
        bound: words that attention keeps in its cache.
    """

    seeds: int = 5
    width: int = 32
    layers: int = 2
    heads: int = 2
    chunk: int = 32
    text: str = field(default_factory=text_here)
    vocabulary: int = 512
    train_lengths: list[int] = field(default_factory=lambda: [64, 128, 256])
    batch_words: int = 2048
    steps: int = 600
    lr: float = 5e-3
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    rows: int = 25
    piece: int = 512
    bound: int = 2048

    def __post_init__(self) -> None:
        check_positive(
            seeds=self.seeds, batch_words=self.batch_words, steps=self.steps, rows=self.rows, piece=self.piece,
            bound=self.bound,
        )  # fmt: skip
        for name in ("train_lengths", "lengths"):
            if min(getattr(self, name), default=0) < 32:
                raise ValueError(f"{name} is {getattr(self, name)}; expected lengths of 32 words or more")


@register_task
class Babilong(Task[BabilongOptions]):
    """Accuracy of answers about facts in a long text, by length, of models trained on short ones."""

    name: ClassVar[str] = "babilong"
    title: ClassVar[str] = "BABILong qa1-qa3: where people and things are, told in a long text"
    budgets: ClassVar[Mapping[str, BabilongOptions]] = {
        "smoke": BabilongOptions(
            seeds=1, width=16, layers=1, steps=6, vocabulary=128, train_lengths=[64], lengths=[64, 512], rows=4
        ),
        "small": BabilongOptions(),
        "full": BabilongOptions(
            width=128, heads=4, vocabulary=8192, batch_words=16_384, train_lengths=[64, 128, 256, 512, 1024],
            steps=20_000, lr=1e-3, lengths=[256, 1024, 4096, 16_384, 65_536], rows=100, bound=16_384,
        ),
    }  # fmt: skip
    columns: ClassVar[Mapping[str, str]] = {
        "exact": "answers that are right, mean of the three tasks, at the shortest length tested",
        "exact_long": "answers that are right, mean of the three tasks, at the longest length",
        **{task: f"{task}: answers that are right at the shortest length" for task in TASKS},
        **{task + LONG: f"{task}: answers that are right at the longest length" for task in TASKS},
        "loss": "loss of the last tenth of the training, nats per answer",
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
            chosen.vocabulary,
            max(chosen.train_lengths),
            chosen.width,
            chosen.layers,
            chosen.heads,
            chosen.chunk,
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
        chosen = self.options
        found = texts(chosen.text, chosen.vocabulary)
        mixer = Mixer(found.ids, found.train, Generator().manual_seed(seed))
        for step in range(chosen.steps):
            length = chosen.train_lengths[step * len(chosen.train_lengths) // chosen.steps]
            yield mixer.lessons(max(len(TASKS), chosen.batch_words // length), length)

    def _tested(self, model: HopeForCausalLM, seed: int) -> Figures:
        """Accuracy by length; that of the first and of the last under the names of the table."""
        chosen = self.options
        found = texts(chosen.text, chosen.vocabulary)
        figures: Figures = {"lengths": list(chosen.lengths)}
        for length in chosen.lengths:
            generator = Generator().manual_seed(2**40 + 1000 * seed + length)  # none of a training
            mixer = Mixer(found.ids, found.test, generator)
            right: dict[str, float] = {}
            for task in TASKS:
                ids, answers = mixer.tests(task, chosen.rows, length)
                said = Reader(model, chosen.piece, chosen.bound).read(ids)[:, 0]
                right[task] = float((said == answers).double().mean())
            right["exact"] = sum(right.values()) / len(TASKS)
            figures.update({f"{name}_at_{length}": value for name, value in right.items()})
            if length == chosen.lengths[0]:
                figures.update(right)
            if length == chosen.lengths[-1]:
                figures.update({name + LONG: value for name, value in right.items()})
        return figures

    def constants(self) -> Mapping[str, Figures]:
        """One of six places at random, and the place that the story named last."""
        return {
            "a random place": _both({task: 1 / len(PLACES) for task in TASKS}),
            "the place named last": _both({task: _named_last(task) for task in TASKS}),
        }

    def claims(self) -> Sequence[Claim]:
        """Claims on Figure 9."""
        chance = max(self.constants()["the place named last"].values())
        return (
            *(
                Kept(f"(10) BABILong is answered as well at the longest length: {row}",
                     "Figure 9 (Hope keeps its accuracy to 10M tokens)", row, "exact", "exact" + LONG,
                     margin=0.05, chance=chance)
                for row in ("hope", "hope-in-context")
            ),
            Ahead("(10) BABILong: Hope is ahead of Titans, and Titans of a delta rule, at the longest length",
                  "Figure 9 (DeltaNet is not in it)", "exact" + LONG, ("hope", "titans", "deltanet"),
                  chance=1 / len(PLACES)),
        )  # fmt: skip

    def note(self) -> str:
        """What differs from BABILong and the paper."""
        chosen = self.options
        return (
            f"Models of width {chosen.width} are trained on the tasks alone, {chosen.steps} steps of "
            f"{chosen.batch_words} words in sequences of {min(chosen.train_lengths)} to "
            f"{max(chosen.train_lengths)}; the paper fine-tunes pretrained models and asks at up to 10M tokens. "
            f"The stories are drawn from a simulation of bAbI's world, the noise is {chosen.text} instead of "
            f"PG19, a token is a word of {chosen.vocabulary}. qa4 and qa5 are left out. {chosen.rows} sequences "
            f"per length and task instead of 100. Attention keeps the last {chosen.bound} words; its rotary "
            "positions are extrapolated as they are."
        )

    def plot(self, rows: Rows, path: Path) -> None:
        """Mean accuracy of the three tasks by length."""
        from nested_learning.evals.report.figures import lines

        points = [(float(length), f"exact_at_{length}") for length in self.options.lengths]
        lines(rows, points, ("words", "answers that are right"), path, log=True)


def _named_last(task: str) -> float:
    """Share of questions whose answer is the place that was named last before them, the question's left out."""
    chance, right, asked = Chance(Generator().manual_seed(0)), 0, 0
    for _ in range(_STORIES):
        drawn = story(task, chance)
        for question in drawn.questions:
            named = [word for fact in drawn.facts[: question.after] for word in fact if word in PLACES]
            others = [place for place in named if place not in question.words]
            right += bool(others) and others[-1] == question.answer
            asked += 1
    return right / asked


def _both(figures: Mapping[str, float]) -> dict[str, Any]:
    """Figures of the three tasks, and their mean, at the shortest and the longest length."""
    mean = {"exact": sum(figures.values()) / len(figures)}
    return {name + ending: value for ending in ("", LONG) for name, value in {**mean, **figures}.items()}
