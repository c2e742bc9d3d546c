"""Language models at equal steps: AdamW, Muon, M3, DMGD and DeltaMomentum, each at its own learning rate.

All optimizers of a seed start from the same weights and read the same batches, with the same schedule and
clipping and without weight decay. `step()` alone is timed on fixed gradients in turn with Muon's, and the
state counted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from nested_learning import HopeForCausalLM
from nested_learning.evals.claims import Ahead, Claim, Reaches
from nested_learning.evals.method import Method
from nested_learning.evals.methods.optimizers import OptimizerMethod, middle, optimizers
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.optimizers.curves import training_curves
from nested_learning.evals.tasks.optimizers.networks import network_optimizer
from nested_learning.models.presets import preset
from nested_learning.optimizers.arithmetic import tensor_bytes
from nested_learning.training.compare import Contender, batches
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import DataBundle, DataConfig, build_data
from nested_learning.training.data.download import SHAKESPEARE_NAME, DownloadError, shakespeare_file
from nested_learning.training.models import model_config, new_model
from nested_learning.training.process import process_state

RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    "m3": (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    "dmgd": (0.3, 1.0, 3.0, 10.0),
    "delta-momentum": (3e-4, 1e-3, 3e-3, 1e-2),
}
BLOCK = 10  # steps timed together: M3 reads its slow momentum in one of ten
TARGET = 1.3  # M3's step() over Muon's
SMALL_SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}


@dataclass(frozen=True)
class LanguageModelOptions:
    """Text, model and training.

    Args:
        model: a preset.
        source: text: "stdlib", "tinyshakespeare", a file, …
        steps: of training.
        batch_size: rows of a step.
        block_size: tokens of a row.
        validation_batches: that give the loss.
        repeats: timed blocks of `step()`.
        shape: fields of the model's configuration.
        rates: how many learning rates are tried, from the middle of the grid.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str
    source: str = "tinyshakespeare"
    steps: int = 200
    batch_size: int = 8
    block_size: int = 256
    validation_batches: int = 20
    repeats: int = 15
    shape: dict[str, Any] = field(default_factory=dict)
    rates: int = 5
    seeds: int = 3
    tuning_seeds: int = 1


def budgets(model: str) -> dict[str, LanguageModelOptions]:
    """Options of a preset by budget."""
    small = LanguageModelOptions(model)
    smoke = dataclasses.replace(
        small,
        source="stdlib",
        steps=4,
        batch_size=2,
        block_size=32,
        validation_batches=2,
        repeats=2,
        shape=SMALL_SHAPE,
        rates=1,
        seeds=1,
    )
    return {
        "smoke": smoke,
        "small": small,
        "full": dataclasses.replace(small, steps=2000, seeds=5, tuning_seeds=3),
    }


class TransformerLanguageTask(Task[LanguageModelOptions]):
    """A language model is trained by each optimizer at equal steps."""

    name = "optimizers-transformer"
    title = "a Transformer language model by optimizer: loss, time of step(), state"
    budgets: ClassVar[Mapping[str, LanguageModelOptions]] = budgets("transformer-tiny")
    columns: ClassVar[Mapping[str, str]] = {
        "validation loss": "nats per token, after equal steps",
        "ms per step()": "milliseconds of a step() alone",
        "of Muon's": "time of a step(), relative to Muon's",
        "state bytes": "bytes of the optimizer's state",
    }
    headline = "validation loss"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return optimizers(*RATES)

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        rates = RATES.get(method.name, RATES["adamw"])
        return [{"lr": lr} for lr in middle(rates, self.options.rates)]

    def missing(self) -> str | None:
        if self.options.source != "tinyshakespeare":
            return None
        try:
            shakespeare_file()
        except DownloadError:
            return (
                f"{SHAKESPEARE_NAME} is not here and could not be downloaded: put it into a folder that "
                "NESTED_LEARNING_DATA names, or give another text as `source`"
            )
        return None

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, OptimizerMethod)
        return {**self.tune(method, seed), **self._costs(method)}

    def tune(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, OptimizerMethod)
        options, bundle = self.options, self._data(seed)
        device = process_state().device
        model = new_model(model_config(options.model, options.shape, bundle.tokenizer), seed).to(device)
        optim = OptimConfig(lr=float(method.settings["lr"]), schedule="linear")
        optimizer = network_optimizer(method, model, optim.betas)
        contender = Contender(method.name, model, optim, options.steps, optimizer)
        for batch in batches(bundle.train, options.batch_size, device):
            contender.step(batch)
        loss = contender.validate(batches(bundle.validation, options.batch_size, device))
        curve = [round(x, 4) for x in contender.losses]
        return {"validation loss": loss, "curve": curve, "parameters": model.num_parameters()}

    def _data(self, seed: int) -> DataBundle:
        options = self.options
        data = DataConfig(
            source=options.source,
            block_size=options.block_size,
            seed=seed,
            max_validation_blocks=options.validation_batches * options.batch_size,
        )
        return build_data(data, options.steps * options.batch_size)

    def _costs(self, method: OptimizerMethod) -> Figures:
        """Milliseconds of a `step()`, in turn with Muon's, and bytes of state."""
        torch.manual_seed(0)
        model = HopeForCausalLM(preset(self.options.model, **self.options.shape)).to(process_state().device)
        ids = torch.randint(0, 256, (1, 64)).to(model.device)
        model(ids, labels=ids).loss.backward()
        betas = OptimConfig().betas
        both = [each.at({"lr": 1e-6}) for each in (method, *optimizers("muon"))]
        made = [network_optimizer(each, model, betas) for each in both]
        ours, muons = _interleaved(made, self.options.repeats)
        return {
            "ms per step()": 1e3 * ours,
            "of Muon's": 1.0 if method.name == "muon" else ours / muons,
            "state bytes": tensor_bytes(list(made[0].state.values())),
        }

    def claims(self) -> Sequence[Claim]:
        time_bound = {"of Muon's": TARGET}
        return [
            Ahead(
                "(11) M3's loss is below Muon's", "Fig. 11", "validation loss", ("m3", "muon"), higher=False
            ),
            Reaches(
                f"M3's step() takes at most {TARGET} times as long as Muon's",
                "Fig. 12",
                "m3",
                time_bound,
                higher=False,
            ),
        ]

    def constants(self) -> Mapping[str, Figures]:
        return {"chance": {"validation loss": math.log(256)}}  # of bytes

    def note(self) -> str:
        return (
            f"{self.options.model} for {self.options.steps:,} steps of {self.options.batch_size} × "
            f"{self.options.block_size} bytes of {Path(self.options.source).name}, timed on the machine "
            "that is named above; Fig. 11 and 12 train models of 24 million parameters and more."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Training loss, mean over seeds and over ten steps."""
        training_curves(rows, "training loss (nats per byte)", path, smooth=BLOCK)


class HopeLanguageTask(TransformerLanguageTask):
    """A Hope language model is trained by each optimizer at equal steps."""

    name = "optimizers-hope"
    title = "a Hope language model by optimizer: loss, time of step(), state"
    budgets: ClassVar[Mapping[str, LanguageModelOptions]] = budgets("hope-tiny")


register_task(TransformerLanguageTask)
register_task(HopeLanguageTask)


def _interleaved(made: Sequence[Optimizer], repeats: int) -> list[float]:
    """Median seconds of a step of each; all step in turn, the first turn left out."""
    times: list[list[float]] = [[] for _ in made]
    wait = torch.accelerator.synchronize if process_state().device.type != "cpu" else lambda: None
    for _ in range(1 + repeats):
        for optimizer, own in zip(made, times, strict=True):
            wait()
            start = time.perf_counter()
            for _ in range(BLOCK):
                optimizer.step()
            wait()
            own.append((time.perf_counter() - start) / BLOCK)
    return [median(own[1:]) for own in times]
