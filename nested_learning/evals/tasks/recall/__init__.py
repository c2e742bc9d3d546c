"""Recall of pairs told in a sequence (MQAR) against their number, also where keys are told again."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.fit import IGNORED, TaskBatch, Training, answers, fit, parameters_of, summary
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import BY_DGD, CONVOLVED, MODELS, Size, TrainedModel
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.recall.data import check_room, reassigned, recall_batch
from nested_learning.training.process import process_state

NO_CLAIM = "none of the paper's, which has no MQAR; the protocol is zoology's (arXiv 2312.04927)"
TEST = 1_000_000  # added to a seed, for test data
ROWS = 64  # sequences that are tested at a time


@dataclass(frozen=True)
class RecallOptions:
    """Size of a recall run.

    Args:
        seeds: that are reported.
        tuning_seeds: others, on which settings are chosen by the mean.
        steps: optimizer steps, each of one batch of one segment.
        batch_size: sequences.
        vocab_size: V; keys are of its lower half, values of its upper one.
        train: segments (tokens, pairs), each as often as it is named; data are drawn afresh, none twice.
        test: segments (tokens, pairs), of different numbers of pairs.
        test_size: sequences per segment.
        forgetting: share of the training batches whose sequences tell half of their keys again; 0: no
            forgetting variant.
        plain: share of the steps before the first such batch: a model that has not yet learned to recall
            learns it later, or not at all, where keys have two values.
        width, layers, heads, mlp: of the models; without MLPs, as in zoology, rows differ in parameters.
        rates: learning rates of which the best is chosen.
    """

    seeds: int = 3
    tuning_seeds: int = 1
    steps: int = 2000
    batch_size: int = 64
    vocab_size: int = 128
    train: list[tuple[int, int]] = field(default_factory=lambda: [(64, 4)] * 3 + [(64, 8), (128, 16)])
    test: list[tuple[int, int]] = field(
        default_factory=lambda: [(64, 4), (64, 8), (128, 16), (128, 24), (128, 32)]
    )
    test_size: int = 256
    forgetting: float = 0.5
    plain: float = 0.5
    width: int = 32
    layers: int = 2
    heads: int = 1
    mlp: bool = False
    rates: list[float] = field(default_factory=lambda: [5e-3, 1e-2])


FULL = RecallOptions(
    seeds=3,
    tuning_seeds=3,
    steps=22_500,  # 32 epochs of 180,000 sequences
    batch_size=256,
    vocab_size=8192,
    train=[(64, 4)] * 5 + [(128, 8), (256, 16), (256, 32), (256, 64)],
    test=[(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)],
    test_size=1000,
    width=128,
    rates=[1e-3, 10**-2.5, 1e-2, 10**-1.5],
)


@register_task
class Recall(Task[RecallOptions]):
    """Multi-query associative recall: how many pairs a state of some size holds."""

    name = "recall"
    title = "values of keys told before (MQAR), against the number of pairs; and of keys that are told again"
    budgets: ClassVar[Mapping[str, RecallOptions]] = {
        "smoke": RecallOptions(
            seeds=1, steps=3, batch_size=8, vocab_size=64, train=[(32, 4)], test=[(32, 2), (32, 4)],
            test_size=16, width=16, rates=[1e-2],
        ),
        "small": RecallOptions(),
        "full": FULL,
    }  # fmt: skip
    columns: ClassVar[Mapping[str, str]] = {
        "accuracy": "share of questions right, mean over the numbers of pairs",
        **{f"accuracy@{pairs}": f"share right with {pairs} pairs" for pairs in (4, 8, 16, 24, 32, 64, 256)},
        "forgetting": "share right for keys told again, mean over the numbers of pairs",
        "stale": "share of these answered with the first value",
        "state bytes": "of the state of one sequence, the longest of the test",
        "parameters": "that are trained",
    }
    headline = "accuracy"

    def methods(self) -> Sequence[Method]:
        """Models of every mixer, attention also behind a convolution as the others and zoology's have it,
        and Titans with the erase of the delta rule.

        Without MLPs a continuum memory system has nothing to differ in.
        """
        every = (*MODELS, CONVOLVED, BY_DGD)
        return [method for method in every if self.options.mlp or method.levels == "one"]

    def accepts(self, method: Method) -> str | None:
        """As for any task; without MLPs, models whose MLPs learn are those whose MLPs do not."""
        refused = super().accepts(method)
        if refused is None and not self.options.mlp and cast(TrainedModel, method).levels != "one":
            return f"without MLPs {method.name!r} is the model of its mixer alone; set mlp to true"
        return refused

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        """Learning rates."""
        return [{"lr": rate} for rate in self.options.rates]

    def run(self, method: Method, seed: int) -> Figures:
        """Accuracies by number of pairs, the state's size, the loss."""
        started, options = time.perf_counter(), self.options
        self._check()
        trained = cast(TrainedModel, method)
        longest = max(length for length, _ in options.train)
        size = Size(
            options.vocab_size, longest, options.width, options.layers, options.heads, mlp=options.mlp
        )
        model = trained.new_model(size, seed)
        losses = fit(trained, model, self._batches(seed), Training(options.steps, options.rates[0]))
        figures = self._tested(model, seed)
        return {
            **figures,
            "state bytes": state_bytes(model, max(length for length, _ in options.test)),
            "parameters": parameters_of(model),
            "seconds": time.perf_counter() - started,
            "loss": summary(losses),
        }

    def _batches(self, seed: int) -> Iterator[TaskBatch]:
        options, generator = self.options, torch.Generator().manual_seed(seed)
        for step in itertools.count():
            which, coin = torch.rand(2, generator=generator).tolist()
            length, pairs = options.train[int(which * len(options.train))]
            twice = step >= options.plain * options.steps and coin < options.forgetting
            updates = self._updates(length, pairs) if twice else 0
            yield recall_batch((options.batch_size, length), pairs, options.vocab_size, generator, updates)

    def _tested(self, model: nn.Module, seed: int) -> Figures:
        generator = torch.Generator().manual_seed(TEST + seed)
        figures: Figures = {}
        means: dict[str, list[float]] = {"accuracy": [], "forgetting": [], "stale": []}
        for length, pairs in self.options.test:
            found = {"accuracy": self._score(model, generator, length, pairs)[0]}
            updates = self._updates(length, pairs)
            if updates:
                found["forgetting"], found["stale"] = self._score(model, generator, length, pairs, pairs // 2)
            for name, value in found.items():
                figures[f"{name}@{pairs}"] = value
                means[name].append(value)
        return {**{name: fmean(values) for name, values in means.items() if values}, **figures}

    def _score(
        self, model: nn.Module, generator: torch.Generator, length: int, pairs: int, updates: int = 0
    ) -> tuple[float, float]:
        """Share of the questions right, and answered with a value that is none any more.

        With updates the questions are those for keys that were told again.
        """
        options = self.options
        batch = recall_batch((options.test_size, length), pairs, options.vocab_size, generator, updates)
        asked, stale = batch.targets != IGNORED, torch.full_like(batch.targets, IGNORED)
        if updates:
            asked, stale = reassigned(batch, pairs, updates)
        given = torch.cat([answers(model, ids) for ids in batch.ids.split(ROWS)])
        return _share(given == batch.targets, asked), _share(given == stale, asked)

    def _updates(self, length: int, pairs: int) -> int:
        """Keys that are told again in the forgetting variant: half of them where there is room, else none."""
        fits = self.options.forgetting > 0 and 4 * pairs + 2 * (pairs // 2) <= length
        return pairs // 2 if fits else 0

    def _check(self) -> None:
        """ValueError for segments without room."""
        for length, pairs in (*self.options.train, *self.options.test):
            check_room(length, pairs, 0)

    def constants(self) -> Mapping[str, Figures]:
        """Guesses: any value, and any of the values told."""
        numbers = [pairs for _, pairs in self.options.test]
        chance = 1 / (self.options.vocab_size - self.options.vocab_size // 2)
        rows = {
            "any value": dict.fromkeys(numbers, chance),
            "any value told": {pairs: 1 / pairs for pairs in numbers},
        }
        return {
            name: {"accuracy": fmean(row.values()), **{f"accuracy@{n}": share for n, share in row.items()}}
            for name, row in rows.items()
        }

    def claims(self) -> Sequence[Claim]:
        """Orders that fixed states are expected in."""
        return [
            Ahead(
                "attention behind a convolution recalls more than the delta rule, and that more than linear "
                "attention",
                NO_CLAIM, "accuracy", (CONVOLVED.name, "deltanet", "linear-attention"),
            ),
            Ahead(
                "where keys are told again, the delta rule is ahead of linear attention, which cannot erase",
                NO_CLAIM, "forgetting", ("deltanet", "linear-attention"),
            ),
            Ahead(
                "self-modifying Titans, whose state is larger, recall more than DeltaNet",
                NO_CLAIM, "accuracy", ("self-modifying-titans", "deltanet"),
            ),
            Ahead(
                "Titans recall more by delta gradient descent than by gradient descent",
                NO_CLAIM, "accuracy", (BY_DGD.name, "titans"),
            ),
        ]  # fmt: skip

    def note(self) -> str:
        """Distance from zoology's protocol."""
        options = self.options
        counted = sorted(Counter(map(tuple, options.train)).items())
        segments = ", ".join(f"({length}, {pairs}) × {times}" for (length, pairs), times in counted)
        text = (
            f"V {options.vocab_size}, width {options.width}, {options.steps:,} steps of "
            f"{options.batch_size} on (tokens, pairs) {segments}; zoology trains widths of 64 to 512 with V "
            "8,192 for 32 epochs of 180,000 sequences at four learning rates. Data here are drawn afresh "
            "instead of in epochs"
        )
        if options.forgetting:
            text += (
                f", and one model learns both tasks: after {options.plain:.0%} of the steps, in "
                f"{options.forgetting:.0%} of the batches half of the keys are told again, if there is room "
                "(zoology: models of their own, four keys). Questions for these keys alone count as "
                "forgetting"
            )
        if not options.mlp:
            text += (
                ". Blocks have no MLP, so Hope is its mixer alone and has no row, and parameters differ: "
                "they and the state's bytes stand in the table"
            )
        text += (
            ". The Transformer has no convolution in front, as the other rows have and zoology's: it has to "
            f"learn to look one token back, which takes it more steps; {CONVOLVED.name} has one"
        )
        return text + "."

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Accuracy against the number of pairs."""
        from nested_learning.evals.report.figures import line_panels

        numbers = [pairs for _, pairs in self.options.test]
        panels = {
            "share of questions right": [(float(n), f"accuracy@{n}") for n in numbers],
            "share right, keys told again": [(float(n), f"forgetting@{n}") for n in numbers],
        }
        line_panels(rows, panels, "pairs", path, log=True)


def state_bytes(model: nn.Module, length: int) -> int:
    """Bytes of a model's state after one sequence; what a model carries from token to token."""
    ids = torch.ones(1, length, dtype=torch.long, device=process_state().device)
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
    return int(cache.nbytes())


def _share(right: Tensor, asked: Tensor) -> float:
    return (right & asked).sum().item() / max(1, int(asked.sum()))
