"""The toy of Fig. 4: momentum and delta momentum on ψ(r, θ) = r² + k(r − θ + a sin ωr)² from (−3.5, 2).

A curved valley with one minimum, ψ(0, 0) = 0. All runs of the grid go side by side as rows of one tensor;
a test compares them with the optimizers' classes. In two variables the erase of delta momentum takes out the
momentum's component along the gradient, times β.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Cache, Claim, new_figure, save
from benchmarks.harness import show

START = (-3.5, 2.0)
TOLERANCE = 1e-4  # converged: ψ stays below this; ψ(START) is 12 and more
GRID = {
    "k": [1.0, 5.0, 20.0],
    "a": [0.5, 1.0, 2.0],
    "omega": [1.0, 2.0, 4.0],
    "lr": [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2],
    "momentum": [0.5, 0.8, 0.9, 0.95, 0.99],
    "beta": [0.1, 0.3, 1.0],
}
QUICK = {"k": [5.0], "a": [1.0], "omega": [2.0], "lr": [5e-3, 1e-2], "momentum": [0.9], "beta": [0.3, 1.0]}
STEPS, QUICK_STEPS = 3000, 1500
SHOWN = (5.0, 1.0, 2.0)  # k, a, ω of the contour plot
EQUAL = (0.01, 0.9)  # its lr and momentum at equal constants


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


def run(seeds: list[int], quick: bool, cache: Cache) -> dict[str, Any]:
    """Steps to converge over the whole grid. Nothing is random; the seeds do not matter."""
    grid, steps = (QUICK, QUICK_STEPS) if quick else (GRID, STEPS)
    settings = {"part": "toy", "grid": grid, "steps": steps, "start": START, "tolerance": TOLERANCE}
    runs = cache.get(settings, lambda: _measure(grid, steps))
    landscapes = list(itertools.product(grid["k"], grid["a"], grid["omega"]))
    figures = {
        **settings,
        "equal_constants": _equal_constants(runs, grid),
        "own_constants": [_own_constants(runs, constants, grid["beta"]) for constants in landscapes],
        "runs": runs,
    }
    return {**figures, "claims": _claims(figures)}


def _measure(grid: dict[str, list[float]], steps: int) -> list[list[Any]]:
    """One row k, a, ω, lr, momentum, β, steps to converge per run; GD is momentum 0, β 0."""
    rules = [(0.0, 0.0), *itertools.product(grid["momentum"], [0.0, *grid["beta"]])]
    product = itertools.product(grid["k"], grid["a"], grid["omega"], grid["lr"], rules)
    rows = [[*row, *rule] for *row, rule in product]
    k, a, omega, lr, momentum, beta = torch.tensor(rows, dtype=torch.float64).unbind(1)
    landscape = Landscape(k, a, omega)
    found = steps_to_converge(descend(landscape, lr, momentum, beta, steps), landscape)
    return [[*row, n] for row, n in zip(rows, found, strict=True)]


def _equal_constants(runs: list[list[Any]], grid: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Per β: delta momentum against momentum at the same k, a, ω, lr and momentum, as in Fig. 4."""
    steps = {(tuple(row[:5]), row[5]): row[6] for row in runs}  # by the constants, and β
    result = []
    for beta in grid["beta"]:
        pairs = [(steps[key, 0.0], n) for (key, own), n in steps.items() if own == beta]
        both = [(plain, delta) for plain, delta in pairs if plain is not None and delta is not None]
        result.append(
            {
                "beta": beta,
                "pairs": len(pairs),
                "delta faster": sum(_faster(delta, plain) for plain, delta in pairs),
                "momentum faster": sum(_faster(plain, delta) for plain, delta in pairs),
                "neither converges": sum(plain is None and delta is None for plain, delta in pairs),
                "only delta converges": sum(plain is None and delta is not None for plain, delta in pairs),
                "only momentum converges": sum(plain is not None and delta is None for plain, delta in pairs),
                "median steps ratio": median(d / p for p, d in both) if both else None,
            }
        )
    return result


def _faster(a: int | None, b: int | None) -> bool:
    return a is not None and (b is None or a < b)


def _own_constants(runs: list[list[Any]], landscape: tuple[float, ...], betas: list[float]) -> dict[str, Any]:
    """The fewest steps of each rule on one landscape, with its best lr, momentum and β."""
    rows = [row for row in runs if tuple(row[:3]) == landscape and row[-1] is not None]
    rules = {
        "gradient descent": [row for row in rows if row[4] == 0],
        "momentum": [row for row in rows if row[4] > 0 and row[5] == 0],
        "delta momentum": [row for row in rows if row[5] > 0],
        **{f"delta, β = {beta:g}": [row for row in rows if row[5] == beta] for beta in betas},
    }
    result: dict[str, Any] = dict(zip(Landscape._fields, landscape, strict=True))
    for name, members in rules.items():
        fastest = min(members, key=lambda row: row[-1]) if members else None
        result[name] = fastest and fastest[-1]
        result[f"{name}: lr, momentum, β"] = fastest and fastest[3:6]
    return result


def _claims(figures: dict[str, Any]) -> list[Claim]:
    equal, own = figures["equal_constants"][-1], figures["own_constants"]
    claims: list[Claim] = [
        {
            "claim": "Fig. 4: at equal constants delta momentum (β = 1) needs fewer steps than momentum",
            "holds": equal["delta faster"] > equal["momentum faster"],
            "because": f"faster at {equal['delta faster']} of {equal['pairs']} points of the grid, slower at "
            f"{equal['momentum faster']}; neither converges at {equal['neither converges']}",
        }
    ]
    fixed = {f"delta, β = {beta:g}": f"lr and momentum, β = {beta:g}" for beta in figures["grid"]["beta"]}
    for name, tuned in {**fixed, "delta momentum": "lr, momentum and β"}.items():
        ahead = sum(_faster(row[name], row["momentum"]) for row in own)
        behind = sum(_faster(row["momentum"], row[name]) for row in own)
        claims.append(
            {
                "claim": f"with the best {tuned} for each landscape, delta momentum needs fewer steps",
                "holds": ahead > behind,
                "because": f"fewer on {ahead} of {len(own)} landscapes, more on {behind}",
            }
        )
    return claims


def display(figures: dict[str, Any]) -> None:
    show("Fig. 4's toy: the same lr and momentum for both", figures["equal_constants"])
    betas = [f"delta, β = {beta:g}" for beta in figures["grid"]["beta"]]
    columns = ("k", "a", "omega", "gradient descent", "momentum", "delta momentum", *betas)
    rows = [{name: row[name] for name in columns} for row in figures["own_constants"]]
    show("Fig. 4's toy: fewest steps to ψ < 1e-4, each with its best lr, momentum and β", rows)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Trajectories at equal constants and at each one's best, and the fewest steps on every landscape."""
    figure, axes = new_figure(3)
    own = next((row for row in figures["own_constants"] if (row["k"], row["a"], row["omega"]) == SHOWN), None)
    _contours(axes[0], {"momentum": (*EQUAL, 0.0), "delta momentum": (*EQUAL, 1.0)}, "equal constants")
    names = ("momentum", "delta momentum")
    tuned = {name: own and own[f"{name}: lr, momentum, β"] for name in names}
    _contours(axes[1], {name: constants for name, constants in tuned.items() if constants}, "each tuned")
    pairs = [(row["momentum"], row["delta momentum"]) for row in figures["own_constants"]]
    pairs = [pair for pair in pairs if None not in pair]
    if pairs:
        axes[2].loglog(*zip(*pairs, strict=True), "o", markersize=4)
        ends = [min(map(min, pairs)), max(map(max, pairs))]
        axes[2].loglog(ends, ends, color="grey", linewidth=1)
    axes[2].set(xlabel="momentum, fewest steps", ylabel="delta momentum, fewest steps")
    axes[2].set_title("every landscape, each tuned", fontsize=9)
    save(figure, path)


def _contours(axes: Any, constants: dict[str, Sequence[float]], title: str) -> None:
    """The paths of rules with constants (lr, momentum, β) on the landscape SHOWN."""
    r, theta = torch.meshgrid(torch.linspace(-4.2, 4.2, 160), torch.linspace(-4.5, 4.5, 160), indexing="ij")
    psi = value(torch.stack([r, theta], -1), Landscape(*SHOWN))
    axes.contourf(r, theta, (psi + 0.1).log(), levels=14, cmap="Greys_r", alpha=0.6)
    for (name, own), colour in zip(constants.items(), ("tab:orange", "tab:blue"), strict=False):
        tensors = [torch.tensor([x], dtype=torch.float64) for x in own]
        points = list(descend(Landscape(*SHOWN), tensors[0], tensors[1], tensors[2], STEPS))
        n = steps_to_converge(points, Landscape(*SHOWN))[0]
        steps = f"more than {STEPS} steps" if n is None else f"{n} steps"
        label = f"{name}, lr {own[0]:g}, α {own[1]:g}, β {own[2]:g}: {steps}"
        axes.plot(
            *torch.cat(points[:400]).T, color=colour, linewidth=0.7, marker=".", markersize=2, label=label
        )
    axes.plot(0, 0, "r*")
    axes.set(xlim=(-4.2, 4.2), ylim=(-4.5, 4.5), xlabel="r", ylabel="θ")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=6, loc="lower right")
