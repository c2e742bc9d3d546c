"""Origin of Hope's figures: one part of it left out at a time, in language, parity and recall."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, cast

import torch
from torch import nn

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.fit import IGNORED, Diverged, Training, answers, fit, parameters_of
from nested_learning.evals.method import Method
from nested_learning.evals.methods.mechanism import GRID, MORE
from nested_learning.evals.methods.models import Size, TrainedModel
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.formal import Strings, all_right
from nested_learning.evals.tasks.formal.languages import LANGUAGES, VOCABULARY
from nested_learning.evals.tasks.recall.data import recall_batch
from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.training.compare import Contender, batches
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import DataBundle, DataConfig, build_data
from nested_learning.training.process import process_state

TEST = 1_000_000  # added to a seed, for test data
ROWS = 64  # sequences that are tested at a time
TABLE = "Table 6"


@dataclass(frozen=True)
class MechanismOptions:
    """Size of a run.

    Args:
        seeds: that are reported, of parity and recall.
        tuning_seeds: others, on which settings are chosen by the mean.
        language_seeds: the first of them, on which language is run too.
        more: further variants stand in the table.
        source: text, as `train --data` takes it.
        max_bytes: of it.
        widths: of the models in language.
        block: bytes that are read at once in language.
        language_steps, language_batch: optimizer steps, and blocks of each.
        validation_blocks: of language.
        windows: lengths of parity's training strings and of Bin 0, then those of Bin 1.
        pairs: pairs that are told in recall, in sequences of eight times as many tokens.
        vocab_size: of recall.
        steps, batch: optimizer steps of parity and recall, and sequences of each.
        test_size: strings of a bin, and sequences of recall.
        width: of the models in parity and recall.
        layers, heads: of all models.
        rates: learning rates of which the best is chosen, by language.
        parity_rate, recall_rate: learning rates there; recall is not learned in so few steps at language's.
        parity_bound: of the inner rate in parity: up to 2 an erase can flip a sign, without which no row
            learns parity.
    """

    seeds: int = 5
    tuning_seeds: int = 1
    language_seeds: int = 3
    more: bool = False
    source: str = "stdlib"
    max_bytes: int = 2 << 20
    widths: list[int] = field(default_factory=lambda: [32, 48, 64])
    block: int = 128
    language_steps: int = 500
    language_batch: int = 8
    validation_blocks: int = 128
    windows: list[tuple[int, int]] = field(default_factory=lambda: [(2, 20), (21, 40)])
    pairs: int = 8
    vocab_size: int = 64
    steps: int = 1000
    batch: int = 32
    test_size: int = 256
    width: int = 32
    layers: int = 2
    heads: int = 2
    rates: list[float] = field(default_factory=lambda: [3e-3])
    parity_rate: float = 3e-3
    recall_rate: float = 1e-2
    parity_bound: float = 2.0


@register_task
class Mechanism(Task[MechanismOptions]):
    """Language, parity and recall with one part of Hope left out at a time, at equal parameters."""

    name = "mechanism"
    title = "what Hope's figures come from: one part left out at a time, in language, parity, recall"
    budgets: ClassVar[Mapping[str, MechanismOptions]] = {
        "smoke": MechanismOptions(
            seeds=1, language_seeds=1, max_bytes=1 << 16, widths=[16], block=32, language_steps=2,
            language_batch=2, validation_blocks=2, windows=[(2, 8), (9, 16)], pairs=2, vocab_size=16, steps=2,
            batch=4, test_size=8, width=16, layers=1,
        ),
        "small": MechanismOptions(),
        "full": MechanismOptions(
            more=True, source="tinyshakespeare", widths=[64, 128, 256], block=512, language_steps=10_000,
            language_batch=16, windows=[(2, 50), (51, 100)], pairs=16, vocab_size=512, steps=10_000, batch=64,
            test_size=1000, width=64, rates=[1e-3, 3e-3], tuning_seeds=3,
        ),
    }  # fmt: skip
    columns: ClassVar[Mapping[str, str]] = {
        "nats": "nats per byte of held-out text, mean over the widths",
        **{f"nats@{width}": f"at width {width}" for width in (16, 32, 48, 64, 128, 256)},
        "parity": "share of strings all right, mean over the bins",
        "parity bin 0": "at the trained lengths",
        "parity bin 1": "at longer ones",
        "recall": "share of the values told that are recalled",
        "memories": "of a layer",
        "state": "numbers of the weights that a layer's memories write to, for one sequence of recall",
        "perplexity": "printed by the paper alone, whose models read 30 billion tokens",
        "parameters": "that are trained in recall",
    }
    headline = "nats"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        """The grid: the first row has every part, each other one part less or one more."""
        return [*GRID, *MORE] if self.options.more else list(GRID)

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        """Learning rates."""
        return [{"lr": rate} for rate in self.options.rates]

    def tune(self, method: Method, seed: int) -> Figures:
        """Figures of language alone, by which the rate is chosen."""
        return self._language(cast(TrainedModel, method), seed)

    def run(self, method: Method, seed: int) -> Figures:
        """Figures of parity and recall, and of language at the first seeds.

        Raises:
            Diverged: a loss is not finite.
        """
        started, trained = time.perf_counter(), cast(TrainedModel, method)
        has_language = seed < self.options.language_seeds
        figures = self._language(trained, seed) if has_language else {}
        figures |= self._parity(trained, seed) | self._recall(trained, seed)
        return {**figures, "seconds": time.perf_counter() - started}

    def _language(self, method: TrainedModel, seed: int) -> Figures:
        """Nats per byte, by the training of `compare`, at each width."""
        options, device = self.options, process_state().device
        bundle = _text(options.source, options.max_bytes, options.block, options.validation_blocks, seed,
                       options.language_steps * options.language_batch)  # fmt: skip
        figures: Figures = {}
        for width in options.widths:
            size = Size(len(bundle.tokenizer), options.block, width, options.layers, options.heads)
            model = cast(Any, method.new_model(size, seed)).to(device)
            optim = OptimConfig(lr=float(method.settings.get("lr", options.rates[0])), schedule="linear")
            optimizer = method.optimizer(model, optim.lr, optim.weight_decay)
            contender = Contender(method.name, model, optim, options.language_steps, optimizer)
            for batch in batches(bundle.train, options.language_batch, device):
                contender.step(batch)
            held_out = batches(bundle.validation, min(options.language_batch, len(bundle.validation)), device)
            nats = contender.validate(held_out)
            if nats is None:
                raise Diverged(f"language at width {width}: the loss is not finite at a rate of {optim.lr:g}")
            figures[f"nats@{width}"] = nats / bundle.bytes_per_token
        return {"nats": fmean(figures.values()), **figures}

    def _parity(self, method: TrainedModel, seed: int) -> Figures:
        """Shares of strings of which every symbol is answered right."""
        options, language = self.options, LANGUAGES["parity"]
        data = Strings(language, options.windows, options.test_size, seed)
        method = self.for_parity(method)
        model = method.new_model(self._size(VOCABULARY, options.windows[0][1]), seed)
        fit(method, model, data.batches(options.batch), Training(options.steps, options.parity_rate))
        bins = {
            f"parity bin {number}": all_right(model, language, data.bin(number, "test"))[0]
            for number in range(len(options.windows))
        }
        return {"parity": fmean(bins.values()), **bins}

    def for_parity(self, method: TrainedModel) -> TrainedModel:
        """The method as parity trains it; a row whose inner rate has no gate keeps its own."""
        bound = {} if method.options.get("rate") == "one" else {"mixer.eta_max": self.options.parity_bound}
        return method.at({"lr": self.options.parity_rate, **bound})

    def _recall(self, method: TrainedModel, seed: int) -> Figures:
        """Share of the questions right, and what the model has for it."""
        options = self.options
        length, method = 8 * options.pairs, method.at({"lr": options.recall_rate})
        model = method.new_model(self._size(options.vocab_size, length), seed)
        train, test = (torch.Generator().manual_seed(number) for number in (seed, TEST + seed))

        def batch(rows: int, generator: torch.Generator) -> Any:
            return recall_batch((rows, length), options.pairs, options.vocab_size, generator)

        endless = (batch(options.batch, train) for _ in iter(int, 1))
        fit(method, model, endless, Training(options.steps, options.recall_rate))
        ids, targets = batch(options.test_size, test)
        given = torch.cat([answers(model, rows) for rows in ids.split(ROWS)])
        right = (given == targets)[targets != IGNORED].double().mean().item()
        return {"recall": right, **_memories(model), "parameters": parameters_of(model)}

    def _size(self, vocab_size: int, longest: int) -> Size:
        options = self.options
        return Size(vocab_size, longest, options.width, options.layers, options.heads, positions=False)

    def constants(self) -> Mapping[str, Figures]:
        """A guess of any byte and of any value told."""
        return {"guess": {"nats": math.log(256), "recall": 1 / self.options.pairs}}

    def claims(self) -> Sequence[Claim]:
        """The paper's claims on single parts, and the control of a linear memory."""
        whole = "mechanism-whole"
        pairs = [
            ("(5) a CMS of two levels is ahead of one MLP of as many parameters", TABLE, whole, "one-level"),
            ("(6) adaptive k and v help", TABLE, whole, "static-k-v"),
            ("(6) adaptive q does not help", TABLE, whole, "adaptive-q"),
            ("(3) momentum helps", TABLE, whole, "no-momentum"),
            ("self-modification helps", "Tables 2 and 6", whole, "static"),
            (
                "more comes from it than from an exact linear memory whose matrix has as many numbers",
                "the control of arXiv 2602.21204", whole, "linear",
            ),
        ]  # fmt: skip
        claims: list[Claim] = [
            Ahead(f"{text} (nats per byte)", source, "nats", (first, f"mechanism-{second}"), higher=False)
            for text, source, first, second in pairs
        ]
        claims += [
            Ahead(
                "self-modification helps to track parity beyond the trained lengths", "Table 5",
                "parity bin 1", (whole, "mechanism-static"),
            ),
            Ahead(
                "self-modification helps recall", "Table 4", "recall", (whole, "mechanism-static"),
                chance=1 / self.options.pairs,
            ),
        ]  # fmt: skip
        return claims

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Perplexities of the paper's table; its whole Hope has an adaptive q."""
        table = {"adaptive-q": 12.24, "whole": 12.19, "no-momentum": 13.58, "one-level": 13.04}
        return {f"mechanism-{row}": {"perplexity": value} for row, value in table.items()}

    def note(self) -> str:
        """Which rows the grid has, and how small it is."""
        options = self.options
        read = options.language_steps * options.language_batch * options.block
        text = (
            f"Language: {read:,} bytes of {options.source} at widths {options.widths}, on the first "
            f"{options.language_seeds} seeds. Parity: lengths {options.windows}, at a rate of "
            f"{options.parity_rate:g} with inner rates up to {options.parity_bound:g}; recall: "
            f"{options.pairs} pairs in {8 * options.pairs} tokens, at {options.recall_rate:g}; both "
            f"{options.steps:,} steps of {options.batch} at width {options.width}, without positions. The "
            "paper's models have 760M parameters or more. The first row has memories that generate k, v, the "
            "rate and the retention, targets of their own, momentum, and two CMS levels; each other row "
            "differs in what its name says, and all have as many parameters, by wider or narrower MLPs. The "
            "linear memory is the delta rule with decay on one head's matrix, exact at every token, with as "
            "many numbers as the memory that the first row reads out; that row's generating memories come on "
            "top of those, and a momentum beside each."
        )
        if not options.more:
            text += (
                " Three CMS levels, CMS levels that learn in context, rate and retention by projections, and "
                "a rate without a gate are rows of the full budget: "
                f"{', '.join(method.name for method in MORE)}."
            )
        return text

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Nats per byte at each width, parity and recall, a plot each."""
        from nested_learning.evals.report.figures import bar_panels

        panels = {f"nats@{width}": f"nats per byte, width {width}" for width in self.options.widths}
        names = ("parity bin 0", "parity bin 1", "recall")
        bar_panels(rows, {**panels, **{name: name for name in names}}, path)


@lru_cache(maxsize=2)
def _text(source: str, max_bytes: int, block: int, blocks: int, seed: int, samples: int) -> DataBundle:
    """Samples of a text in the order of a seed; the runs of a process that follow each other share them."""
    config = DataConfig(
        source=source, max_bytes=max_bytes, block_size=block, max_validation_blocks=blocks, seed=seed
    )
    return build_data(config, samples)


def _memories(model: nn.Module) -> Figures:
    """Memories of the first layer that has some, and the numbers of their weights for one sequence."""
    layer = next(module for module in model.modules() if isinstance(module, MemoryLayer))
    return {
        "memories": len(layer.system.memories),
        "state": sum(weight.numel() for weight in layer.initial.values()),
    }
