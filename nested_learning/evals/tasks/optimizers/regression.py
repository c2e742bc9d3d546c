"""Regression on a changing, correlated stream: gradient descent against delta gradient descent (eq 57).

One sample a step: y = W*x + noise, W* drawn anew every `period` steps; E[xxᵀ] = Σ has eigenvalues that span
`condition`, and successive inputs are correlated by `serial`. W follows online.

DGD does not minimise L = ½E‖Wx − y‖² but L + ½E‖Wx‖², whose minimum is W*/2. So errors are measured to the
minimum that a rule has: DGD is compared with gradient descent on L + ½E‖Wx‖², and with gradient descent on L,
each relative to its own scale, which is as if 2W were read from DGD (W is linear in y). DGD's error to the
minimum of L as it stands is a figure of its own; it cannot fall below a quarter.

Each figure has a learning rate of its own on each stream, the one with the lowest mean error over the stream
on seeds that are not reported: a run chooses it itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.method import Method
from nested_learning.evals.methods.optimizers import OptimizerMethod, optimizers
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import new_figure, save
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import TUNING_SEED, Task

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS = (TUNING_SEED, TUNING_SEED + 1)
THIN = 4  # steps between the points of a curve
GOALS = (1.0, 0.5)  # factors of W* in the minimum that an error is measured to
ON_L, ON_BOTH, TO_W = "error on L", "error on L + ½E‖Wx‖²", "error to W*"
KINDS = ("correlated", "uncorrelated")


@dataclass(frozen=True)
class RegressionStream:
    """A stream of samples.

    Attributes:
        condition: ratio of the largest and the smallest eigenvalue of E[xxᵀ].
        serial: correlation of successive inputs.
        period: steps between two changes of W*; None: it never changes.
        inputs, outputs: of W.
        steps: samples.
        noise: standard deviation around W*x.
    """

    condition: float
    serial: float
    period: int | None
    inputs: int = 16
    outputs: int = 4
    steps: int = 400
    noise: float = 0.1

    @property
    def kind(self) -> str:
        """Whether inputs are correlated, among each other or in time."""
        return KINDS[0] if self.condition > 1 or self.serial > 0 else KINDS[1]

    @property
    def name(self) -> str:
        """Constants in words."""
        changes = "W* fixed" if self.period is None else f"W* new every {self.period}"
        return f"condition {self.condition:g}, serial {self.serial:g}, {changes}"


@dataclass(frozen=True)
class RegressionOptions:
    """Streams and learning rates.

    Args:
        quick: one short stream and two rates alone.
        seeds: reported ones.
    """

    quick: bool = False
    seeds: int = 5

    @property
    def streams(self) -> list[RegressionStream]:
        """The streams that are followed."""
        if self.quick:
            return [RegressionStream(100.0, 0.9, 10, inputs=4, outputs=2, steps=30)]
        worlds = itertools.product([(1.0, 0.0), (100.0, 0.0), (1.0, 0.9), (100.0, 0.9)], [None, 100])
        return [RegressionStream(condition, serial, period) for (condition, serial), period in worlds]

    @property
    def rates(self) -> Sequence[float]:
        """The learning rates that are tried."""
        return RATES[3:5] if self.quick else RATES


class StreamSamples:
    """The samples of a stream and what is needed to measure an error; a seed gives all methods the same."""

    def __init__(self, stream: RegressionStream, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = stream.inputs
        axes = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
        eigenvalues = torch.logspace(0, 1, n, base=stream.condition)
        self.root = axes * (eigenvalues / eigenvalues.mean()).sqrt()  # Σ = root rootᵀ, trace n
        noise = torch.randn(stream.steps, n, generator=generator)
        z = [noise[0]]
        for e in noise[1:]:
            z.append(stream.serial * z[-1] + (1 - stream.serial**2) ** 0.5 * e)
        self.x = torch.stack(z) @ self.root.T  # [steps, inputs]
        changes = 1 if stream.period is None else -(-stream.steps // stream.period)
        solutions = torch.randn(changes, stream.outputs, n, generator=generator) * n**-0.5
        self.solutions = [solutions[i // (stream.period or stream.steps)] for i in range(stream.steps)]
        clean = torch.stack([W @ x for W, x in zip(self.solutions, self.x, strict=True)])
        self.y = clean + stream.noise * torch.randn(clean.shape, generator=generator)

    def error(self, W: Tensor, step: int, goal: float) -> Tensor:
        """E‖(W − goal·W*)x‖² over inputs x ~ N(0, Σ), relative to that of W = 0."""
        target = goal * self.solutions[step]
        return ((W - target) @ self.root).square().sum() / (target @ self.root).square().sum()


def follow(
    method: OptimizerMethod, shrink: bool, stream: RegressionStream, seed: int
) -> dict[float, list[float] | None]:
    """The error to each of GOALS before every step [steps], or None if it did not stay finite.

    Args:
        method: at its learning rate.
        shrink: ½‖Wx‖² is added to the loss.
        stream: what is followed.
        seed: decides the samples.
    """
    world = StreamSamples(stream, seed)
    layer = nn.Linear(stream.inputs, stream.outputs, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = method.build(layer)
    errors = []
    for step, (x, y) in enumerate(zip(world.x, world.y, strict=True)):
        errors.append(torch.stack([world.error(layer.weight.detach(), step, goal) for goal in GOALS]))
        answer = layer(x)
        loss = 0.5 * (answer - y).square().sum()
        if shrink:
            loss = loss + 0.5 * answer.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curves = zip(GOALS, torch.stack(errors).unbind(1), strict=True)
    return {goal: curve.tolist() if bool(curve.isfinite().all()) else None for goal, curve in curves}


def curve_of(method: OptimizerMethod, figure: str, stream: RegressionStream, seed: int) -> list[float] | None:
    """The curve [steps] of a figure; None where the run diverged."""
    shrink = method.name != "dgd" and figure == ON_BOTH
    to_half = (method.name == "dgd" and figure != TO_W) or shrink
    return follow(method, shrink, stream, seed)[GOALS[to_half]]


@cache
def best_rate(name: str, figure: str, stream: RegressionStream, rates: tuple[float, ...]) -> float | None:
    """The rate with the lowest mean error over the stream on the seeds that tune; None: all diverged."""
    found: dict[float, float] = {}
    for lr in rates:
        [method] = optimizers(name)
        curves = [curve_of(method.at({"lr": lr}), figure, stream, seed) for seed in TUNING_SEEDS]
        if None not in curves:
            found[lr] = fmean(fmean(curve) for curve in curves if curve is not None)
    return min(found, key=lambda lr: found[lr]) if found else None


@register_task
class RegressionTask(Task[RegressionOptions]):
    """Gradient descent and delta gradient descent follow streams of correlated samples."""

    name = "optimizers-regression"
    title = "a changing stream with correlated inputs: gradient descent against DGD (eq 57)"
    budgets: ClassVar[Mapping[str, RegressionOptions]] = {
        "smoke": RegressionOptions(quick=True, seeds=1),
        "small": RegressionOptions(),
        "full": RegressionOptions(seeds=20),
    }
    columns: ClassVar[Mapping[str, str]] = {
        f"{figure}, {kind}": "mean over the stream, relative to W = 0; geometric mean of the streams"
        for figure in (ON_L, ON_BOTH, TO_W)
        for kind in KINDS
    }
    headline = f"{ON_L}, {KINDS[0]}"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return optimizers("gradient-descent", "dgd")

    def accepts(self, method: Method) -> str | None:
        known = [each.name for each in self.methods()]
        return None if method.name in known else f"{self.name} compares {' and '.join(known)} alone"

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, OptimizerMethod)
        figures: Figures = {"curves": {}, "rates": {}}
        for figure in (ON_L, ON_BOTH, TO_W):
            errors: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
            for stream in self.options.streams:
                lr = best_rate(method.name, figure, stream, tuple(self.options.rates))
                curve = None if lr is None else curve_of(method.at({"lr": lr}), figure, stream, seed)
                name = f"{figure}, {stream.name}"
                figures[name] = None if curve is None else fmean(curve)
                figures["rates"][name] = lr
                figures["curves"][name] = curve and [round(e, 5) for e in curve[::THIN]]
                errors[stream.kind].append(figures[name])
            for kind, values in errors.items():
                whole = [value for value in values if value is not None]
                mean = math.exp(fmean(map(math.log, whole))) if whole and None not in values else None
                figures[f"{figure}, {kind}"] = mean
        return figures

    def constants(self) -> Mapping[str, Figures]:
        return {"zero": dict.fromkeys(self.columns, 1.0)}

    def claims(self) -> Sequence[Claim]:
        return [
            Ahead(
                f"on {kind} inputs DGD follows its minimum more closely than gradient descent on {what}",
                "eq 57",
                f"{figure}, {kind}",
                ("dgd", "gradient-descent"),
                higher=False,
            )
            for figure, what in ((ON_L, "L"), (ON_BOTH, "L + ½E‖Wx‖²"))
            for kind in KINDS
        ]

    def note(self) -> str:
        return (
            "Gradient descent on L is measured to W*, on L + ½E‖Wx‖² and DGD to W*/2, their minima; a rate "
            "is chosen for each figure and stream, on seeds of their own."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Error over the steps, on the first and on the last stream that changes."""
        figure, axes = new_figure(2)
        changing = [stream for stream in self.options.streams if stream.period is not None]
        for axis, stream in zip(axes, (changing[0], changing[-1]), strict=True):
            for row in rows.values():
                for goal in (ON_L, ON_BOTH) if row.method != "dgd" else (ON_L,):
                    first = next(iter(row.figures.values()), {})
                    curve = first.get("curves", {}).get(f"{goal}, {stream.name}")
                    if curve is not None:
                        steps = range(0, THIN * len(curve), THIN)
                        axis.semilogy(steps, curve, label=f"{row.method}, {goal}", linewidth=1)
            axis.set(xlabel="step", ylabel="error to the minimum")
            axis.set_title(stream.name, fontsize=9)
            if axis.lines:
                axis.legend(fontsize=7)
        save(figure, path)
