"""Tasks that train on short sequences and ask after long ones, read in pieces with the state carried."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from torch import Generator

from nested_learning._checks import check_positive
from nested_learning.evals.carried import CarriedReader
from nested_learning.evals.fit import TaskBatch, Training, fit, parameters_of, summary
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import MODELS, Size, TrainedModel
from nested_learning.evals.rows import Figures
from nested_learning.evals.task import Task
from nested_learning.models import HopeForCausalLM

LONG = "_long"  # ending of the figures at the longest length
_TESTS = 2**40  # added to the seed of what tests draw: none of it is in a training


# Beside the default, at which what is told once is written at an eighth or at half of its strength: such a
# bound is safe for any chunk of keys (docs/models.md), and these are for keys that are not all alike.
INNER_BOUNDS = {"titans": 0.5, "self_modifying_titans": 1.0}


@dataclass(frozen=True)
class LengthOptions:
    """Options of a task by length.

    Args:
        seeds: that are reported.
        tuning_seeds: others, on which settings are chosen by the mean.
        width, layers, heads, chunk: of the models; see `Size`.
        train_lengths: tokens of training sequences; a training begins with the first length and goes on to
            the next one when its share of the steps is done. One that stands twice has twice the share: a
            model that has not learned to look up at the short length does not at a longer one.
        batch_tokens: tokens of a training batch: the shorter the sequences, the more of them.
        steps, lr: of the training.
        lr_factors: times `lr`, the learning rates of which each method gets its best, by its loss.
        lengths: tokens of the sequences that are tested, questions included.
        rows: test sequences per length and kind.
        piece: tokens that are read at once in a test.
        bound: tokens that attention keeps in its cache.

    Raises:
        ValueError: a number below 1, no length, or no learning rate above 0.
    """

    seeds: int = 5
    tuning_seeds: int = 1
    width: int = 32
    layers: int = 2
    heads: int = 2
    chunk: int = 32
    train_lengths: list[int] = field(default_factory=lambda: [128, 128, 256])
    batch_tokens: int = 2048
    steps: int = 600
    lr: float = 5e-3
    lr_factors: list[float] = field(default_factory=lambda: [1.0])
    lengths: list[int] = field(default_factory=lambda: [256, 512, 2048, 8192])
    rows: int = 15
    piece: int = 512
    bound: int = 2048

    def __post_init__(self) -> None:
        names = ("seeds", "tuning_seeds", "batch_tokens", "steps", "rows", "piece", "bound")
        check_positive(**{name: getattr(self, name) for name in names})
        for name in ("train_lengths", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected one length or more, in tokens")
        if not self.lr_factors or min(self.lr_factors) <= 0:
            raise ValueError(f"lr_factors is {self.lr_factors}; expected one number above 0, or more")

    def tuning_note(self) -> str:
        """Sentence on what is chosen for each model."""
        return (
            f"Each model has the best of {len(self.lr_factors)} learning rate(s), rows of Titans, where "
            "there are several, also of two bounds of the inner rate."
        )


LengthsT = TypeVar("LengthsT", bound=LengthOptions)


class ByLength(Task[LengthsT]):
    """A task whose figures are given at the shortest and, under names with `LONG`, at the longest length.

    Attributes:
        kinds: of questions, by name, each with what it is; "exact" is the mean over them.
    """

    headline: ClassVar[str] = "exact_long"
    kinds: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abstractmethod
    def lessons(self, rows: int, length: int, generator: Generator) -> TaskBatch:
        """A training batch [rows, length]."""

    @abstractmethod
    def score(self, reader: CarriedReader, length: int, generator: Generator) -> Figures:
        """Figures at a length: of each kind, and what a plot needs besides. The reader has read nothing."""

    def methods(self) -> Sequence[Method]:
        """Every model that is trained from random weights."""
        return MODELS

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        """Learning rates; where there are several, at `lr` also a wider bound of a memory's inner rate."""
        lr, factors = self.options.lr, self.options.lr_factors
        outer = [{"lr": factor * lr} for factor in factors]
        trained = cast(TrainedModel, method)
        bound = INNER_BOUNDS.get(trained.mixer)
        if bound is None or "eta_max" in trained.options or len(factors) == 1:
            return outer
        return [*outer, {"lr": lr, "mixer.eta_max": bound}]

    def run(self, method: Method, seed: int) -> Figures:
        """Train on short sequences, then read long ones in pieces and ask."""
        started, chosen = time.perf_counter(), self.options
        model, figures = self._trained(method, seed)
        figures.update(self._tested(CarriedReader(model, chosen.piece, chosen.bound), seed))
        return {**figures, "parameters": parameters_of(model), "seconds": time.perf_counter() - started}

    def tune(self, method: Method, seed: int) -> Figures:
        """The loss at the end of the training, negative, in the place of the headline: nothing is tested."""
        _, figures = self._trained(method, seed)
        return {**figures, self.headline: -figures["loss"]}

    def _trained(self, method: Method, seed: int) -> tuple[HopeForCausalLM, Figures]:
        """A trained model and how its loss fell; every batch is a new draw."""
        chosen, trained = self.options, cast(TrainedModel, method)
        size = Size(
            self.vocab_size,
            max(chosen.train_lengths),
            chosen.width,
            chosen.layers,
            chosen.heads,
            chosen.chunk,
        )
        model = cast(HopeForCausalLM, trained.new_model(size, seed))
        losses = fit(trained, model, self._batches(seed), Training(chosen.steps, chosen.lr, 0.01))
        last = losses[-max(1, len(losses) // 10) :]
        return model, {"loss": sum(last) / len(last), "losses": summary(losses)}

    def _batches(self, seed: int) -> Iterator[TaskBatch]:
        """Training batches; the lengths in turn, from the first to the last."""
        chosen, generator = self.options, Generator().manual_seed(seed)
        for step in range(chosen.steps):
            length = chosen.train_lengths[step * len(chosen.train_lengths) // chosen.steps]
            yield self.lessons(max(len(self.kinds), chosen.batch_tokens // length), length, generator)

    def _tested(self, reader: CarriedReader, seed: int) -> Figures:
        """Figures of every length, "…_at_LENGTH", and those of the table; what is no number by length."""
        lengths = self.options.lengths
        figures: Figures = {"lengths": list(lengths)}
        for length in lengths:
            found = self.score(reader, length, Generator().manual_seed(_TESTS + 1000 * seed + length))
            found["exact"] = sum(found[kind] for kind in self.kinds) / len(self.kinds)
            numbers = {name: value for name, value in found.items() if isinstance(value, float)}
            for name in found.keys() - numbers.keys():
                figures.setdefault(name, {})[str(length)] = found[name]
            figures.update({f"{name}_at_{length}": value for name, value in numbers.items()})
            if length == lengths[0]:
                figures.update(numbers)
            if length == lengths[-1]:
                figures.update({name + LONG: value for name, value in numbers.items()})
        return figures


def table_columns(kinds: Sequence[str], tokens: str) -> dict[str, str]:
    """Columns of a task by length: the mean, each kind, at the shortest and the longest length."""
    ends = (("", "shortest"), (LONG, "longest"))
    return {
        **{f"exact{end}": f"right, mean of all kinds, at the {which} length" for end, which in ends},
        **{
            k + end: f"{k.replace('_', ' ')}: right at the {which} length"
            for end, which in ends
            for k in kinds
        },
        "loss": f"loss of the last tenth of the training, nats per {tokens} asked",
        "parameters": "parameters",
        "seconds": "seconds of a run",
    }


def at_any_length(figures: Mapping[str, float]) -> dict[str, Any]:
    """A row of figures that are the same at every length, with their mean."""
    mean = {"exact": sum(figures.values()) / len(figures)}
    return {name + end: value for end in ("", LONG) for name, value in {**mean, **figures}.items()}
