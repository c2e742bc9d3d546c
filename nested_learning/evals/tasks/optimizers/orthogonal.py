"""Continual learning of orthogonal tasks (section 4.3, eq 45): who forgets the first when learning the tenth?

Task i is the regression L_i = ½E‖Wx − W*x‖² on inputs x of a subspace U_i; the subspaces are orthogonal to
each other and one W* solves all tasks. So the gradients of different tasks are orthogonal, gradient descent
without a memory forgets nothing, and what is forgotten is the optimizer's doing. One optimizer goes through
all tasks, one after the other, with its state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.method import Method
from nested_learning.evals.methods.optimizers import OptimizerMethod, middle, optimizers
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import new_figure, save
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task

GRADIENT_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
UNIT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # rules whose step does not depend on the gradient's size
UNIT = ("adam", "muon", "m3")


@dataclass(frozen=True)
class OrthogonalOptions:
    """Sizes of the tasks.

    Args:
        tasks: in sequence.
        rank: dimensions of each task's inputs.
        outputs: of W.
        batch: samples of a step.
        steps: per task.
        noise: standard deviation of the targets around W*x.
        rates: how many learning rates are tried, from the middle of the grid.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    tasks: int = 10
    rank: int = 4
    outputs: int = 8
    batch: int = 16
    steps: int = 60
    noise: float = 0.1
    rates: int = 6
    seeds: int = 5
    tuning_seeds: int = 2


@dataclass
class OrthogonalTasks:
    """Orthonormal bases [tasks, inputs, rank] of the tasks' inputs, and W* [outputs, inputs]."""

    bases: Tensor
    solution: Tensor

    @classmethod
    def draw(cls, options: OrthogonalOptions, generator: torch.Generator) -> OrthogonalTasks:
        inputs = options.tasks * options.rank
        frame = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q
        bases = frame.view(inputs, options.tasks, options.rank).transpose(0, 1)
        solution = torch.randn(options.outputs, inputs, generator=generator) * options.rank**-0.5
        return cls(bases, solution)

    def sample(
        self, task: int, options: OrthogonalOptions, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs [batch, inputs] and noisy targets [batch, outputs]."""
        x = torch.randn(options.batch, options.rank, generator=generator) @ self.bases[task].T
        y = x @ self.solution.T
        return x, y + options.noise * torch.randn(y.shape, generator=generator)

    def losses(self, W: Tensor) -> Tensor:
        """½E‖Wx − W*x‖² of every task [tasks], exactly and without the noise, relative to W = 0."""
        miss = torch.einsum("oi,tir->tor", W - self.solution, self.bases)
        zero = torch.einsum("oi,tir->tor", self.solution, self.bases)
        return miss.square().sum((1, 2)) / zero.square().sum((1, 2))


def learn(method: OptimizerMethod, seed: int, options: OrthogonalOptions) -> list[list[float]] | None:
    """The losses [tasks] before training and after each task, or None if the run diverged."""
    generator = torch.Generator().manual_seed(seed)
    tasks = OrthogonalTasks.draw(options, generator)
    layer = nn.Linear(tasks.solution.shape[1], tasks.solution.shape[0], bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = method.build(layer)
    history = [tasks.losses(layer.weight.detach())]
    for task in range(options.tasks):
        for _ in range(options.steps):
            x, y = tasks.sample(task, options, generator)
            optimizer.zero_grad()
            (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
        history.append(tasks.losses(layer.weight.detach()))
    curve = torch.stack(history)
    return curve.tolist() if bool(curve.isfinite().all()) else None


def scores(curve: list[list[float]] | None) -> Figures:
    """Means over tasks: the loss right after the task, at the end, and the rise between, without the last."""
    names = ("after its task", "at the end", "forgetting")
    if curve is None:
        return dict.fromkeys(names)
    history = torch.tensor(curve)
    learned, end = history[1:].diagonal(), history[-1]
    values = [learned.mean().item(), end.mean().item(), (end - learned)[:-1].mean().item()]
    return {name: v if math.isfinite(v) else None for name, v in zip(names, values, strict=True)}


@register_task
class OrthogonalTask(Task[OrthogonalOptions]):
    """One matrix learns orthogonal tasks one after the other."""

    name = "optimizers-orthogonal"
    title = "forgetting over orthogonal tasks, by optimizer (section 4.3, eq 45)"
    version = 2  # 1: a trial on the tuning seed was the mean over several
    budgets: ClassVar[Mapping[str, OrthogonalOptions]] = {
        "smoke": OrthogonalOptions(tasks=3, rank=2, outputs=3, batch=4, steps=6, rates=1, seeds=1),
        "small": OrthogonalOptions(),
        "full": OrthogonalOptions(seeds=20),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "at the end": "loss over all tasks at the end, relative to W = 0",
        "after its task": "loss of each task when it has just been learned",
        "forgetting": "rise of the loss between the two",
    }
    headline = "at the end"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return optimizers("gradient-descent", "momentum", "adam", "delta-momentum", "dmgd", "muon", "m3")

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        rates = UNIT_RATES if method.name in UNIT else GRADIENT_RATES
        return [{"lr": lr} for lr in middle(rates, self.options.rates)]

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, OptimizerMethod)
        curve = learn(method, seed, self.options)
        return {**scores(curve), "curve": curve}

    def constants(self) -> Mapping[str, Figures]:
        return {"zero": {"at the end": 1.0, "after its task": 1.0, "forgetting": 0.0}}

    def claims(self) -> Sequence[Claim]:
        def ahead(text: str, figure: str, *order: str) -> Ahead:
            return Ahead(text, "section 4.3, eq 45", figure, order, higher=False)

        return [
            *(
                ahead(f"M3's slow momentum forgets less than {other}", "forgetting", "m3", other)
                for other in ("momentum", "adam", "muon")
            ),
            *(
                ahead(f"M3 ends with a lower loss over all tasks than {other}", "at the end", "m3", other)
                for other in ("momentum", "adam", "muon")
            ),
            ahead("delta momentum forgets less than momentum", "forgetting", "delta-momentum", "momentum"),
            ahead("DMGD forgets less than momentum", "forgetting", "dmgd", "momentum"),
        ]

    def plot(self, rows: MethodRows, path: Path) -> None:
        """The first task's loss while the others are learned, and the mean loss of the tasks so far."""
        figure, (first, so_far) = new_figure(2)
        for row in rows.values():
            curves = [figures.get("curve") for figures in row.figures.values()]
            kept = [torch.tensor(curve) for curve in curves if curve is not None]
            if kept:
                history = torch.stack(kept).mean(0)
                numbers = range(1, len(history))
                first.semilogy(numbers, history[1:, 0], marker=".", label=row.method)
                means = [history[i, :i].mean() for i in numbers]
                so_far.semilogy(numbers, means, marker=".", label=row.method)
        first.set(xlabel="tasks learned", ylabel="relative loss of the first task")
        so_far.set(xlabel="tasks learned", ylabel="mean relative loss of the tasks so far")
        figure.legend(*so_far.get_legend_handles_labels(), loc="outside right center", fontsize=7)
        save(figure, path)
