"""A small vision transformer on scikit-learn's digits: AdamW, Muon, M3 (the paper's Fig. 11, small)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.method import Method
from nested_learning.evals.methods.optimizers import OptimizerMethod, middle, optimizers
from nested_learning.evals.registry import register_task
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task
from nested_learning.evals.tasks.optimizers.curves import training_curves
from nested_learning.evals.tasks.optimizers.networks import network_optimizer
from nested_learning.parts import EMBEDDING, HEAD
from nested_learning.training.config import OptimConfig
from nested_learning.training.optim import lr_factor

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
PIXELS, PATCH, CLASSES = 8, 2, 10
INSTALL = (
    "scikit-learn's digits: pip install scikit-learn, or pip install 'nested-learning-torch[benchmarks]'"
)


@dataclass(frozen=True)
class DigitsOptions:
    """Sizes of the model, its training, and the parts of the data.

    Args:
        width, layers, heads: of the transformer.
        batch: images of a step.
        steps: of training.
        validation: images that choose the learning rate.
        test: images that are reported.
        rates: how many learning rates are tried, from the middle of the grid.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    width: int = 48
    layers: int = 3
    heads: int = 4
    batch: int = 64
    steps: int = 300
    validation: int = 300
    test: int = 400
    rates: int = 5
    seeds: int = 5
    tuning_seeds: int = 10  # of three, the rounding of another processor chose another rate for Muon


class Digits(NamedTuple):
    """Pictures [N, 8, 8] in [0, 1] and their classes [N]."""

    images: Tensor
    labels: Tensor


def load_digits() -> Digits:
    """The 1,797 digits.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(f"this task needs {INSTALL}") from error
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    return Digits(images, torch.tensor(found.target))


def divide(data: Digits, options: DigitsOptions, seed: int) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test images, in an order that the seed decides."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    train = len(order) - options.validation - options.test
    parts = order.split([train, options.validation, options.test])
    return tuple(Digits(data.images[i], data.labels[i]) for i in parts)  # type: ignore[return-value]


class VisionTransformer(nn.Module):
    """Patches of 2 × 2 pixels, learned positions, pre-norm encoder, mean over patches, linear head."""

    def __init__(self, options: DigitsOptions) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH**2, options.width)
        self.positions = nn.Parameter(0.02 * torch.randn((PIXELS // PATCH) ** 2, options.width))
        layer = nn.TransformerEncoderLayer(
            options.width, options.heads, 4 * options.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, options.layers, nn.LayerNorm(options.width), enable_nested_tensor=False
        )
        for block in self.encoder.layers:  # torch starts all of them as copies of one
            for p in block.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        self.head = nn.Linear(options.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 8, 8]."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.encoder(self.embedding(patches) + self.positions).mean(1))

    def part_names(self) -> dict[str, str]:
        """Handles of the parameters that map no hidden vectors to hidden vectors."""
        return {"embedding": EMBEDDING, "positions": EMBEDDING, "head": HEAD}


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices [size], epoch after epoch in a new order; the rest of an epoch is left out."""
    while True:
        yield from torch.randperm(count)[: count - count % size].split(size)


def train(method: OptimizerMethod, seed: int, options: DigitsOptions, data: Digits) -> Figures:
    """Losses in nats (of every batch, and at the end of validation and test) and test accuracy."""
    torch.manual_seed(seed)
    training, validation, test = divide(data, options, seed)
    model = VisionTransformer(options)
    optimizer = network_optimizer(method, model, (0.9, 0.999))
    lr = float(method.settings["lr"])
    schedule = LambdaLR(optimizer, lr_factor(OptimConfig(lr=lr, schedule="cosine"), options.steps))
    losses = []
    for chosen in islice(batches(len(training.labels), options.batch), options.steps):
        loss = cross_entropy(model(training.images[chosen]), training.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 5))
    model.eval()
    with torch.no_grad():
        logits = model(test.images)
        final = {
            "training loss": cross_entropy(model(training.images), training.labels).item(),
            "validation loss": cross_entropy(model(validation.images), validation.labels).item(),
            "test loss": cross_entropy(logits, test.labels).item(),
        }
        accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    figures = {name: value if math.isfinite(value) else None for name, value in final.items()}
    curve = losses if all(map(math.isfinite, losses)) else None
    parameters = sum(p.numel() for p in model.parameters())
    return {**figures, "test accuracy": accuracy, "curve": curve, "parameters": parameters}


@register_task
class DigitsTask(Task[DigitsOptions]):
    """A vision transformer learns digits, by optimizer."""

    name = "optimizers-digits"
    title = "a small vision transformer on digits, by optimizer (Fig. 11 in miniature)"
    version = 2  # 1: a trial on the tuning seed was the mean over several
    budgets: ClassVar[Mapping[str, DigitsOptions]] = {
        "smoke": DigitsOptions(width=8, layers=1, heads=2, batch=16, steps=4, rates=1, seeds=1),
        "small": DigitsOptions(),
        "full": DigitsOptions(steps=2000, seeds=10),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "training loss": "nats, over all training images at the end",
        "test loss": "nats, at the end",
        "test accuracy": "share of the test images, at the end",
    }
    headline = "test loss"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return optimizers("adamw", "muon", "m3")

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        return [{"lr": lr} for lr in middle(RATES, self.options.rates)]

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("sklearn") else INSTALL

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, OptimizerMethod)
        return train(method, seed, self.options, load_digits())

    def tune(self, method: Method, seed: int) -> Figures:
        """The validation loss in the place of the headline."""
        return {self.headline: self.run(method, seed)["validation loss"]}

    def constants(self) -> Mapping[str, Figures]:
        chance = math.log(CLASSES)
        guessing = {"training loss": chance, "test loss": chance, "test accuracy": 1 / CLASSES}
        return {"chance": guessing}

    def claims(self) -> Sequence[Claim]:
        return [
            Ahead(f"(11) M3's {figure} is below {name}'s", "Fig. 11", figure, ("m3", other), higher=False)
            for figure in ("training loss", "test loss")
            for other, name in (("adamw", "AdamW"), ("muon", "Muon"))
        ]

    def note(self) -> str:
        return (
            "Fig. 11 has ViTs of 24 and 86 million parameters on ImageNet-21K; this is one of "
            f"{self.options.layers} layers of width {self.options.width} on 1,797 digits."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Training loss, mean over seeds."""
        training_curves(rows, "training loss (nats)", path, log=True)
