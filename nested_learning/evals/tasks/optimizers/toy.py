"""The toy of Fig. 4: momentum and delta momentum on ψ(r, θ) = r² + k(r − θ + a sin ωr)² from (−3.5, 2).

A curved valley with one minimum, ψ(0, 0) = 0. A seed stands for a landscape, that is for constants k, a, ω;
nothing is random. All constants of a rule go side by side as rows of one tensor; a test compares them with
the optimizers' classes. In two variables the erase of delta momentum takes out the momentum's component along
the gradient, times β.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nested_learning.evals.claims import DOES_NOT, HOLDS, UNTOLD, Ahead, Claim, Verdict, interval
from nested_learning.evals.method import Method
from nested_learning.evals.methods.optimizers import middle, optimizers
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import new_figure, save
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.task import Task

START = (-3.5, 2.0)
TOLERANCE = 1e-4  # converged: ψ stays below this; ψ(START) is 12 and more
LANDSCAPES = tuple(itertools.product((1.0, 5.0, 20.0), (0.5, 1.0, 2.0), (1.0, 2.0, 4.0)))  # k, a, ω
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2)
MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.99)
BETAS = (0.1, 0.3, 1.0)
SHOWN = LANDSCAPES.index((5.0, 1.0, 2.0))  # of the contour plot
EQUAL = (0.01, 0.9)  # its lr and momentum at equal constants


@dataclass(frozen=True)
class ToyOptions:
    """Size of the grid.

    Args:
        steps: most of a run.
        rates: how many learning rates are tried, from the middle of the grid.
        momenta: how many momenta are tried, from the middle of the grid.
        seeds: landscapes, of 27.
    """

    steps: int = 3000
    rates: int = 11
    momenta: int = 5
    seeds: int = 27


class Landscape(NamedTuple):
    """Constants of ψ: numbers, or tensors [N] of one landscape per row."""

    k: Any
    a: Any
    omega: Any


def value(p: Tensor, landscape: Landscape) -> Tensor:
    """ψ of the points p [..., 2]."""
    k, a, omega = landscape
    r, theta = p.unbind(-1)
    return r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2


def gradient(p: Tensor, landscape: Landscape) -> Tensor:
    """∇ψ at the points p [..., 2]."""
    k, a, omega = landscape
    r, theta = p.unbind(-1)
    slope = 2 * k * (r - theta + a * torch.sin(omega * r))
    return torch.stack([2 * r + slope * (1 + a * omega * torch.cos(omega * r)), -slope], -1)


def descend(landscape: Landscape, lr: Tensor, momentum: Tensor, beta: Tensor, steps: int) -> Iterator[Tensor]:
    """m ← αm − β (m·g/‖g‖²) g + g, p ← p − lr·m for N runs at once; β = 0 is momentum, and α = 0 then GD.

    Args:
        landscape: one per row, or one for all.
        lr, momentum, beta: [N], float64.
        steps: how many.

    Yields:
        The points [N, 2], steps + 1 times, the start first.
    """
    p = torch.tensor(START, dtype=torch.float64).repeat(len(lr), 1)
    m = torch.zeros_like(p)
    lr, momentum, beta = (column.unsqueeze(-1) for column in (lr, momentum, beta))
    yield p
    for _ in range(steps):
        g = gradient(p, landscape)
        unit = g / g.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        m = momentum * m - beta * (m * unit).sum(-1, keepdim=True) * unit + g
        p = p - lr * m
        yield p


def steps_to_converge(points: Iterable[Tensor], landscape: Landscape) -> list[int | None]:
    """First step of each run from which on ψ stays below TOLERANCE, None where there is none."""
    above = torch.stack([~(value(p, landscape) < TOLERANCE) for p in points])  # [steps + 1, N]; NaN is above
    last = above.shape[0] - above.flip(0).to(torch.uint8).argmax(0)  # first step after the last one above
    last = torch.where(above.any(0), last, torch.zeros_like(last))
    return [None if n > above.shape[0] - 1 else n for n in last.tolist()]


def constants_of(method: str, options: ToyOptions) -> list[tuple[float, float, float]]:
    """All (lr, momentum, β) of a rule; gradient descent is momentum 0, β 0."""
    momenta: Sequence[float] = (0.0,)
    betas: Sequence[float] = (0.0,)
    if method != "gradient-descent":
        momenta = middle(MOMENTA, options.momenta)
    if method == "delta-momentum":
        betas = BETAS
    return list(itertools.product(middle(RATES, options.rates), momenta, betas))


def measure(method: str, landscape: Landscape, options: ToyOptions) -> list[list[Any]]:
    """Rows lr, momentum, β, steps to converge."""
    rows = constants_of(method, options)
    lr, momentum, beta = torch.tensor(rows, dtype=torch.float64).unbind(1)
    found = steps_to_converge(descend(landscape, lr, momentum, beta, options.steps), landscape)
    return [[*row, n] for row, n in zip(rows, found, strict=True)]


@dataclass(frozen=True)
class FasterAtEqualConstants:
    """The claim that delta momentum needs fewer steps than momentum at the same constants (Fig. 4).

    It is decided by the mean over all landscapes and constants of +1 where it is faster, −1 where momentum
    is, and 0 where neither converges or both take as long.

    Attributes:
        text: in words.
        source: figure that states it.
        beta: β of delta momentum.
    """

    text: str
    source: str
    beta: float

    def judge(self, rows: MethodRows) -> Verdict:
        """The verdict, and how often each is faster."""
        ours, theirs = (rows[name].figures if name in rows else {} for name in ("delta-momentum", "momentum"))
        signs: list[float] = []
        for seed in sorted(ours.keys() & theirs.keys()):
            plain = {tuple(row[:2]): row[3] for row in theirs[seed]["runs"]}  # by lr and momentum
            signs += [
                _sign(steps, plain[lr, momentum])
                for lr, momentum, beta, steps in ours[seed]["runs"]
                if beta == self.beta
            ]
        found = interval(signs)
        if found is None:
            return Verdict(UNTOLD, "no figures of momentum and delta-momentum")
        faster, slower = signs.count(1.0), signs.count(-1.0)
        because = (
            f"faster at {faster} of {len(signs)} points of the grid, slower at {slower}; mean sign "
            f"{fmean(signs):+.2f} [{found[0]:+.2f}, {found[1]:+.2f}]"
        )
        return Verdict(HOLDS if found[0] > 0 else DOES_NOT if found[1] < 0 else UNTOLD, because)


def _sign(ours: int | None, theirs: int | None) -> float:
    a, b = (math.inf if steps is None else steps for steps in (ours, theirs))
    return float((a < b) - (a > b))


@register_task
class ToyTask(Task[ToyOptions]):
    """Steps of simple rules to the minimum of a curved valley, over a grid of constants."""

    name = "optimizers-toy"
    title = "steps to the minimum of Fig. 4's valley: momentum and delta momentum"
    budgets: ClassVar[Mapping[str, ToyOptions]] = {
        "smoke": ToyOptions(steps=500, rates=2, momenta=1, seeds=2),
        "small": ToyOptions(),
        "full": ToyOptions(steps=20_000),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "log2 steps": "log2 of the fewest steps over all constants; the limit where none converges",
        "log2 steps, β 0.1": "delta momentum with this β alone",
        "log2 steps, β 0.3": "delta momentum with this β alone",
        "log2 steps, β 1": "delta momentum with this β alone",
        "converged": "share of the constants that lead to the minimum within the limit",
    }
    headline = "log2 steps"
    higher_is_better = False

    def methods(self) -> Sequence[Method]:
        return optimizers("gradient-descent", "momentum", "delta-momentum")

    def accepts(self, method: Method) -> str | None:
        known = [each.name for each in self.methods()]
        return None if method.name in known else f"{self.name} writes out the rules of {', '.join(known)}"

    def run(self, method: Method, seed: int) -> Figures:
        if not 0 <= seed < len(LANDSCAPES):
            raise ValueError(f"a seed stands for one of {len(LANDSCAPES)} landscapes, got {seed}")
        runs = measure(method.name, Landscape(*LANDSCAPES[seed]), self.options)
        figures = {f"log2 steps, β {beta:g}": self._fewest(runs, {beta}) for beta in BETAS}
        if method.name != "delta-momentum":  # so that each β can be compared with it
            figures = dict.fromkeys(figures, self._fewest(runs, {0.0}))
        converged = sum(row[3] is not None for row in runs) / len(runs)
        fewest = self._fewest(runs, {0.0, *BETAS})
        return {"log2 steps": fewest, **figures, "converged": converged, "runs": runs}

    def _fewest(self, runs: list[list[Any]], betas: set[float]) -> float:
        steps = [row[3] for row in runs if row[2] in betas and row[3] is not None]
        return math.log2(min(steps, default=self.options.steps))

    def constants(self) -> Mapping[str, Figures]:
        return {"limit": {"log2 steps": math.log2(self.options.steps), "converged": 0.0}}

    def claims(self) -> Sequence[Claim]:
        equal = "(12) at equal constants delta momentum (β = 1) needs fewer steps than momentum"
        tuned = [(f"lr and momentum, β = {beta:g},", f"log2 steps, β {beta:g}") for beta in BETAS] + [
            ("lr, momentum and β", "log2 steps")
        ]
        return [
            FasterAtEqualConstants(equal, "Fig. 4", BETAS[-1]),
            *(
                Ahead(
                    f"(12) with the best {what} for each landscape delta momentum needs fewer steps",
                    "Fig. 4",
                    figure,
                    ("delta-momentum", "momentum"),
                    higher=False,
                )
                for what, figure in tuned
            ),
        ]

    def note(self) -> str:
        return (
            "Each seed is a landscape: constants k, a, ω of a grid of 27; differences are paired by these. "
            f"Converged: ψ stays below {TOLERANCE:g} within {self.options.steps:,} steps."
        )

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Trajectories at equal constants and at each one's best, and the fewest steps on every landscape."""
        figure, axes = new_figure(3, width=4.0)
        names = ("momentum", "delta-momentum")
        equal = {"momentum": (*EQUAL, 0.0), "delta-momentum": (*EQUAL, 1.0)}
        _contours(axes[0], equal, "equal constants", self.options.steps)
        found = {name: rows[name].figures for name in names if name in rows}
        tuned = {name: best for name in found if (best := _best(found[name].get(SHOWN, {}).get("runs", ())))}
        _contours(axes[1], tuned, "each tuned", self.options.steps)
        if len(found) == len(names):
            seeds = sorted(found["momentum"].keys() & found["delta-momentum"].keys())
            pairs = [[2 ** found[name][seed]["log2 steps"] for name in names] for seed in seeds]
            if pairs:
                axes[2].loglog(*zip(*pairs, strict=True), "o", markersize=4)
                ends = [min(map(min, pairs)), max(map(max, pairs))]
                axes[2].loglog(ends, ends, color="grey", linewidth=1)
        axes[2].set(xlabel="momentum, fewest steps", ylabel="delta momentum, fewest steps")
        axes[2].set_title("every landscape, each tuned", fontsize=9)
        save(figure, path)


def _best(runs: Sequence[Sequence[Any]]) -> tuple[float, float, float] | None:
    """(lr, momentum, β) of the fewest steps."""
    converged = [row for row in runs if row[3] is not None]
    if not converged:
        return None
    lr, momentum, beta, _ = min(converged, key=lambda row: row[3])
    return lr, momentum, beta


def _contours(axes: Any, constants: Mapping[str, Sequence[float]], title: str, limit: int) -> None:
    """The paths of rules with constants (lr, momentum, β) on the landscape SHOWN."""
    shown = Landscape(*LANDSCAPES[SHOWN])
    r, theta = torch.meshgrid(torch.linspace(-4.2, 4.2, 160), torch.linspace(-4.5, 4.5, 160), indexing="ij")
    psi = value(torch.stack([r, theta], -1), shown)
    axes.contourf(r, theta, (psi + 0.1).log(), levels=14, cmap="Greys_r", alpha=0.6)
    for (name, own), colour in zip(constants.items(), ("tab:orange", "tab:blue"), strict=False):
        tensors = [torch.tensor([x], dtype=torch.float64) for x in own]
        points = list(descend(shown, tensors[0], tensors[1], tensors[2], limit))
        n = steps_to_converge(points, shown)[0]
        steps = f"more than {limit} steps" if n is None else f"{n} steps"
        label = f"{name}, lr {own[0]:g}, α {own[1]:g}, β {own[2]:g}: {steps}"
        axes.plot(
            *torch.cat(points[:400]).T, color=colour, linewidth=0.7, marker=".", markersize=2, label=label
        )
    axes.plot(0, 0, "r*")
    axes.set(xlim=(-4.2, 4.2), ylim=(-4.5, 4.5), xlabel="r", ylabel="θ")
    axes.set_title(title, fontsize=9)
    if constants:
        axes.legend(fontsize=6, loc="lower right")
