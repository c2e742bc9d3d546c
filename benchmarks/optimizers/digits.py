"""A small vision transformer on scikit-learn's digits: AdamW, Muon, M3 (the paper's Fig. 11, small)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.common import (
    Cache,
    Claim,
    below,
    best,
    edge,
    finite,
    mean,
    new_figure,
    plus_minus,
    save,
    spread,
    table,
)
from benchmarks.harness import show
from benchmarks.optimizers.contestants import NETWORK, split
from nested_learning.training.config import OptimConfig
from nested_learning.training.optim import lr_factor

CONTESTANTS = ("AdamW", "Muon", "M3")
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 0.1]
SCORES = ("training loss", "test loss", "test accuracy")
TUNING_SEEDS = [1000, 1001, 1002]
PIXELS, PATCH, CLASSES = 8, 2, 10


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int = 48
    layers: int = 3
    heads: int = 4
    batch: int = 64
    steps: int = 300
    validation: int = 300  # images that choose the learning rate
    test: int = 400


QUICK = Size(width=8, layers=1, heads=2, batch=16, steps=4)


class Split(NamedTuple):
    """Pictures [N, 8, 8] in [0, 1] and their classes [N]."""

    images: Tensor
    labels: Tensor


def load() -> Split:
    """The 1,797 digits. Ends the program with code 2 where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print(
            "this part needs scikit-learn's digits: pip install scikit-learn, or "
            "pip install 'nested-learning-torch[benchmarks]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    return Split(images, torch.tensor(digits.target))


def divide(data: Split, size: Size, seed: int) -> tuple[Split, Split, Split]:
    """Training, validation and test images, in an order that the seed decides."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    train = len(order) - size.validation - size.test
    parts = order.split([train, size.validation, size.test])
    return tuple(Split(data.images[i], data.labels[i]) for i in parts)  # type: ignore[return-value]


class VisionTransformer(nn.Module):
    """Patches of 2 × 2 pixels, learned positions, pre-norm encoder, mean over patches, linear head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH**2, size.width)
        self.positions = nn.Parameter(0.02 * torch.randn((PIXELS // PATCH) ** 2, size.width))
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, size.layers, nn.LayerNorm(size.width), enable_nested_tensor=False
        )
        for block in self.encoder.layers:  # torch starts all of them as copies of one
            for p in block.parameters():
                if p.ndim == 2:
                    nn.init.xavier_uniform_(p)
        self.head = nn.Linear(size.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 8, 8]."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.encoder(self.embedding(patches) + self.positions).mean(1))

    def matrices(self) -> set[str]:
        """Names of the weights that map hidden vectors to hidden vectors."""
        return {n for n, p in self.named_parameters() if n.startswith("encoder.") and p.ndim == 2}


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices [size], epoch after epoch in a new order; the rest of an epoch is left out."""
    while True:
        yield from torch.randperm(count)[: count - count % size].split(size)


def train(name: str, lr: float, seed: int, size: Size, data: Split) -> dict[str, Any]:
    """Losses in nats (of every batch, and at the end of validation and test) and test accuracy."""
    torch.manual_seed(seed)
    training, validation, test = divide(data, size, seed)
    model = VisionTransformer(size)
    optimizer = NETWORK[name](*split(model, model.matrices()), lr, (0.9, 0.999))
    schedule = LambdaLR(optimizer, lr_factor(OptimConfig(lr=lr, schedule="cosine"), size.steps))
    losses = []
    for chosen in islice(batches(len(training.labels), size.batch), size.steps):
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
    curve = losses if all(map(_is_finite, losses)) else None
    return {**{key: finite(value) for key, value in final.items()}, "test accuracy": accuracy, "curve": curve}


def _is_finite(value: float) -> bool:
    return finite(value) is not None


def run(seeds: list[int], quick: bool, cache: Cache) -> dict[str, Any]:
    """Every optimizer at the learning rate with the lowest validation loss."""
    size, data = QUICK if quick else Size(), load()
    rates = RATES[2:4] if quick else RATES
    rows, curves = [], {}
    for name in CONTESTANTS:

        def result(lr: float, seed: int, name: str = name) -> dict[str, Any]:
            settings = {"part": "digits", **asdict(size), "optimizer": name, "lr": lr, "seed": seed}
            return cache.get(settings, lambda: train(name, lr, seed, size, data))

        def on_validation(lr: float, result: Callable[..., dict[str, Any]] = result) -> float | None:
            return mean(result(lr, seed)["validation loss"] for seed in TUNING_SEEDS)

        lr = best(rates, on_validation)
        found = [result(lr, seed) for seed in seeds]
        row: dict[str, Any] = {"optimizer": name, "lr": edge(lr, rates)}
        for score in SCORES:
            values = [each[score] for each in found]
            row |= {score: mean(values), f"± {score}": spread(values), f"{score}, seeds": values}
        rows.append(row)
        curves[name] = [each["curve"] for each in found]
    figures = {"part": "digits", **asdict(size), "seeds": seeds, "tuning_seeds": TUNING_SEEDS, "rates": rates}
    return {**figures, "rows": rows, "curves": curves, "claims": _claims(rows)}


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    row = {row["optimizer"]: row for row in rows}
    return [
        {
            "claim": f"Fig. 11 in miniature: M3's {score} is below AdamW's and Muon's",
            "holds": all(below(row["M3"][score], row[name][score]) for name in ("AdamW", "Muon")),
            "because": ", ".join(f"{name} {plus_minus(row[name], score)}" for name in row),
        }
        for score in ("training loss", "test loss")
    ]


def display(figures: dict[str, Any]) -> None:
    title = f"vision transformer on digits, {figures['steps']} steps, {len(figures['seeds'])} seeds"
    show(f"{title} (* end of the grid)", table(figures["rows"], SCORES))


def plot(figures: dict[str, Any], path: Path) -> None:
    """Training loss, mean over seeds."""
    figure, (axis,) = new_figure(1, width=5.2)
    for row in figures["rows"]:
        kept = [curve for curve in figures["curves"][row["optimizer"]] if curve is not None]
        if kept:
            label = f"{row['optimizer']}, lr {row['lr']}: test loss {row['test loss']:.3f}"
            axis.semilogy(torch.tensor(kept).mean(0), label=label, linewidth=1)
    axis.set(xlabel="step", ylabel="training loss (nats)")
    axis.legend(fontsize=8)
    save(figure, path)
