"""Continual learning of orthogonal tasks (section 4.3, eq 45): who forgets the first when learning the tenth?

Task i is the regression L_i = ½E‖Wx − W*x‖² on inputs x of a subspace U_i; the subspaces are orthogonal to
each other and one W* solves all tasks. So the gradients of different tasks are orthogonal, gradient descent
without a memory forgets nothing, and what is forgotten is the optimizer's doing. One optimizer goes through
all tasks, one after the other, with its state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Cache,
    Claim,
    below,
    best,
    edge,
    finite,
    mean,
    new_figure,
    save,
    spread,
    table,
)
from benchmarks.harness import show
from benchmarks.optimizers.contestants import REGRESSION_RATES, SIMPLE

SCORES = ("after its task", "at the end", "forgetting")
TUNING_SEEDS = [1000, 1001]  # other tasks than those that are reported


@dataclass(frozen=True, kw_only=True)
class Size:
    tasks: int = 10
    rank: int = 4  # dimensions of each task's inputs
    outputs: int = 8
    batch: int = 16
    steps: int = 60  # per task
    noise: float = 0.1  # standard deviation of the targets around W*x


QUICK = Size(tasks=3, rank=2, outputs=3, batch=4, steps=6)


@dataclass
class Tasks:
    """Orthonormal bases [tasks, inputs, rank] of the tasks' inputs, and W* [outputs, inputs]."""

    bases: Tensor
    solution: Tensor

    @classmethod
    def draw(cls, size: Size, generator: torch.Generator) -> Tasks:
        inputs = size.tasks * size.rank
        frame = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q
        bases = frame.view(inputs, size.tasks, size.rank).transpose(0, 1)
        return cls(bases, torch.randn(size.outputs, inputs, generator=generator) * size.rank**-0.5)

    def sample(self, task: int, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [batch, inputs] and noisy targets [batch, outputs]."""
        x = torch.randn(size.batch, size.rank, generator=generator) @ self.bases[task].T
        y = x @ self.solution.T
        return x, y + size.noise * torch.randn(y.shape, generator=generator)

    def losses(self, W: Tensor) -> Tensor:
        """½E‖Wx − W*x‖² of every task [tasks], exactly and without the noise, relative to W = 0."""
        miss = torch.einsum("oi,tir->tor", W - self.solution, self.bases)
        zero = torch.einsum("oi,tir->tor", self.solution, self.bases)
        return miss.square().sum((1, 2)) / zero.square().sum((1, 2))


def learn(name: str, lr: float, seed: int, size: Size) -> list[list[float]] | None:
    """The losses [tasks] before training and after each task, or None if the run diverged."""
    generator = torch.Generator().manual_seed(seed)
    tasks = Tasks.draw(size, generator)
    W = nn.Parameter(torch.zeros_like(tasks.solution))
    optimizer = SIMPLE[name]([W], lr)
    history = [tasks.losses(W.detach())]
    for task in range(size.tasks):
        for _ in range(size.steps):
            x, y = tasks.sample(task, size, generator)
            optimizer.zero_grad()
            (0.5 * (x @ W.T - y).square().sum(1).mean()).backward()
            optimizer.step()
        history.append(tasks.losses(W.detach()))
    curve = torch.stack(history)
    return curve.tolist() if bool(curve.isfinite().all()) else None


def scores(curve: list[list[float]] | None) -> dict[str, float | None]:
    """Means over tasks: the loss right after the task, at the end, and the rise between, without the last."""
    if curve is None:
        return dict.fromkeys(SCORES)
    history = torch.tensor(curve)
    learned, end = history[1:].diagonal(), history[-1]
    values = [learned.mean(), end.mean(), (end - learned)[:-1].mean()]
    return {score: finite(value.item()) for score, value in zip(SCORES, values, strict=True)}


def run(seeds: list[int], quick: bool, cache: Cache) -> dict[str, Any]:
    """Every optimizer at the learning rate with the lowest loss over all tasks at the end."""
    size = QUICK if quick else Size()
    rates = {name: grid[1:4:2] if quick else grid for name, grid in REGRESSION_RATES.items()}

    def curve_of(name: str, lr: float, seed: int) -> list[list[float]] | None:
        settings = {"part": "orthogonal", **asdict(size), "optimizer": name, "lr": lr, "seed": seed}
        return cache.get(settings, lambda: learn(name, lr, seed, size))

    rows, curves = [], {}
    for name in SIMPLE:

        def at_the_end(lr: float, name: str = name) -> float | None:
            return mean(scores(curve_of(name, lr, seed))["at the end"] for seed in TUNING_SEEDS)

        lr = best(rates[name], at_the_end)
        curves[name] = [curve_of(name, lr, seed) for seed in seeds]
        found = [scores(curve) for curve in curves[name]]
        row: dict[str, Any] = {"optimizer": name, "lr": edge(lr, rates[name])}
        for score in found[0]:
            values = [each[score] for each in found]
            row |= {score: mean(values), f"± {score}": spread(values), f"{score}, seeds": values}
        rows.append(row)
    figures = {
        "part": "orthogonal",
        **asdict(size),
        "seeds": seeds,
        "tuning_seeds": TUNING_SEEDS,
        "rates": rates,
    }
    return {**figures, "rows": rows, "curves": curves, "claims": _claims(rows)}


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    row = {row["optimizer"]: row for row in rows}

    def claim(text: str, ours: str, theirs: list[str], score: str) -> Claim:
        figures = ", ".join(f"{name} {_text(row[name][score])}" for name in [ours, *theirs])
        holds = all(below(row[ours][score], row[name][score]) for name in theirs)
        return {"claim": text, "holds": holds, "because": f"{score}: {figures}"}

    return [
        claim(
            "M3's slow momentum forgets less than one fast momentum",
            "M3",
            ["momentum", "Adam", "Muon"],
            "forgetting",
        ),
        claim("M3 ends with a lower loss over all tasks", "M3", ["momentum", "Adam", "Muon"], "at the end"),
        claim("delta momentum forgets less than momentum", "delta momentum", ["momentum"], "forgetting"),
        claim("DMGD forgets less than momentum", "DMGD", ["momentum"], "forgetting"),
    ]


def _text(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2g}"


def display(figures: dict[str, Any]) -> None:
    title = f"{figures['tasks']} orthogonal tasks, {len(figures['seeds'])} seeds, loss relative to W = 0"
    show(f"{title} (* end of the grid)", table(figures["rows"], SCORES))


def plot(figures: dict[str, Any], path: Path) -> None:
    """The first task's loss while the others are learned, and the mean loss of the tasks so far."""
    figure, (first, so_far) = new_figure(2, width=4.6)
    for name, curves in figures["curves"].items():
        kept = [torch.tensor(curve) for curve in curves if curve is not None]
        if not kept:
            continue
        history = torch.stack(kept).mean(0)
        numbers = range(1, len(history))
        first.semilogy(numbers, history[1:, 0], marker=".", label=name)
        so_far.semilogy(numbers, [history[i, :i].mean() for i in numbers], marker=".", label=name)
    first.set(xlabel="tasks learned", ylabel="relative loss of the first task")
    so_far.set(xlabel="tasks learned", ylabel="mean relative loss of the tasks so far")
    figure.legend(*so_far.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save(figure, path)
