"""Regression on a changing, correlated stream: gradient descent against delta gradient descent (eq 57).

One sample a step: y = W*x + noise, W* drawn anew every `period` steps; E[xxᵀ] = Σ has eigenvalues that span
`condition`, and successive inputs are correlated by `serial`. W follows online.

DGD does not minimise L = ½E‖Wx − y‖² but L + ½E‖Wx‖², whose minimum is W*/2. So errors are measured to the
minimum that a rule has: DGD is compared with gradient descent on L + ½E‖Wx‖², and with gradient descent on L,
each relative to its own scale, which is as if 2W were read from DGD (W is linear in y). DGD's error to the
minimum of L as it stands is kept as the last column; it cannot fall below a quarter.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    plus_minus,
    save,
    spread,
)
from benchmarks.harness import show
from nested_learning.optimizers import DeltaGD

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
TUNING_SEEDS = [1000, 1001]
THIN = 4  # steps between the points of a curve


@dataclass(frozen=True, kw_only=True)
class Stream:
    condition: float
    serial: float
    period: int | None  # None: W* never changes
    inputs: int = 16
    outputs: int = 4
    steps: int = 400
    noise: float = 0.1


class Rule(NamedTuple):
    """ "GD" or "DGD", and whether ½‖Wx‖² is added to the loss."""

    name: str
    shrink: bool = False


class Method(NamedTuple):
    """A rule, and the factor of W* in the minimum that its error is measured to."""

    rule: Rule
    goal: float


METHODS = {
    "GD on L": Method(Rule("GD"), 1.0),
    "GD on L + ½E‖Wx‖²": Method(Rule("GD", shrink=True), 0.5),
    "DGD": Method(Rule("DGD"), 0.5),
    "DGD, error to W*": Method(Rule("DGD"), 1.0),
}
GOALS = (1.0, 0.5)
WORLDS = [
    Stream(condition=condition, serial=serial, period=period)
    for (condition, serial), period in itertools.product(
        [(1.0, 0.0), (100.0, 0.0), (1.0, 0.9), (100.0, 0.9)], [None, 100]
    )
]
QUICK = [Stream(condition=100.0, serial=0.9, period=10, inputs=4, outputs=2, steps=30)]


class World:
    """The samples of a stream and what is needed to measure an error; a seed gives all methods the same."""

    def __init__(self, stream: Stream, seed: int) -> None:
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


def follow(rule: Rule, lr: float, stream: Stream, seed: int) -> dict[float, list[float] | None]:
    """The error to each of GOALS before every step [steps], or None if it did not stay finite."""
    world = World(stream, seed)
    layer = nn.Linear(stream.inputs, stream.outputs, bias=False)
    nn.init.zeros_(layer.weight)
    delta = DeltaGD(layer.parameters(), lr=lr).attach(layer) if rule.name == "DGD" else None
    optimizer = delta or torch.optim.SGD(layer.parameters(), lr=lr)
    errors = []
    for step, (x, y) in enumerate(zip(world.x, world.y, strict=True)):
        errors.append(torch.stack([world.error(layer.weight.detach(), step, goal) for goal in GOALS]))
        answer = layer(x)
        loss = 0.5 * (answer - y).square().sum()
        if rule.shrink:
            loss = loss + 0.5 * answer.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curves = zip(GOALS, torch.stack(errors).unbind(1), strict=True)
    return {goal: curve.tolist() if bool(curve.isfinite().all()) else None for goal, curve in curves}


def run(seeds: list[int], quick: bool, cache: Cache) -> dict[str, Any]:
    """Every method on every stream, at the learning rate with the lowest mean error over the stream."""
    worlds, rates = (QUICK, RATES[3:5]) if quick else (WORLDS, RATES)
    rows = [_row(stream, name, seeds, rates, cache) for stream in worlds for name in METHODS]
    figures = {"part": "regression", "seeds": seeds, "tuning_seeds": TUNING_SEEDS, "rates": rates}
    return {**figures, "rows": rows, "claims": _claims(rows)}


def _row(stream: Stream, name: str, seeds: list[int], rates: list[float], cache: Cache) -> dict[str, Any]:
    rule, goal = METHODS[name]

    def errors(lr: float, seed: int) -> dict[str, Any]:
        settings = {"part": "regression", **asdict(stream), **rule._asdict(), "lr": lr, "seed": seed}
        found = cache.get(settings, lambda: [_condense(c) for c in follow(rule, lr, stream, seed).values()])
        return found[GOALS.index(goal)]

    lr = best(rates, lambda lr: mean(errors(lr, seed)["error"] for seed in TUNING_SEEDS))
    found = [errors(lr, seed) for seed in seeds]
    values = [each["error"] for each in found]
    world = {key: asdict(stream)[key] for key in ("condition", "serial", "period")}
    row = {**world, "method": name, "lr": edge(lr, rates), "error": mean(values), "± error": spread(values)}
    return {**row, "errors": values, "curve": found[0]["curve"]}


def _condense(curve: list[float] | None) -> dict[str, Any]:
    """Mean error over the stream, and the curve with every fourth step, for the plot."""
    if curve is None:
        return {"error": None, "curve": None}
    return {"error": finite(sum(curve) / len(curve)), "curve": [round(e, 5) for e in curve[::THIN]]}


PAIRS = {"L": ("DGD", "GD on L"), "L + ½E‖Wx‖²": ("DGD", "GD on L + ½E‖Wx‖²")}


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Claims that DGD follows more closely, for each objective, on streams with and without correlation."""
    claims: list[Claim] = []
    for objective, (ours, theirs) in PAIRS.items():
        for correlated in (True, False):
            chosen = [r for r in rows if (r["condition"] > 1 or r["serial"] > 0) == correlated]
            pairs = list(
                zip(
                    *([r["error"] for r in chosen if r["method"] == name] for name in (ours, theirs)),
                    strict=True,
                )
            )
            if not pairs:
                continue
            ahead = sum(below(a, b) for a, b in pairs)
            ratios = sorted(a / b for a, b in pairs if a is not None and b is not None)
            kind = "correlated" if correlated else "uncorrelated"
            claims.append(
                {
                    "claim": f"on {kind} inputs DGD follows its minimum more closely than GD on {objective}",
                    "holds": ahead > len(pairs) / 2,
                    "because": f"lower error on {ahead} of {len(pairs)} streams; error of DGD / GD "
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                }
            )
    return claims


def display(figures: dict[str, Any]) -> None:
    """One line per stream, one column per method."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in figures["rows"]:
        world = {key: row[key] for key in ("condition", "serial", "period")}
        line = lines.setdefault(tuple(world.values()), world)
        line[row["method"]] = f"{plus_minus(row, 'error')} (lr {row['lr']})"
    title = f"mean error over the stream, relative to W = 0, {len(figures['seeds'])} seeds"
    show(f"{title} (* end of the grid)", list(lines.values()))


def plot(figures: dict[str, Any], path: Path) -> None:
    """Error over the steps, on the first and on the last stream that changes."""
    figure, axes = new_figure(2, width=4.6)
    changing = [row for row in figures["rows"] if row["period"] is not None]
    for axis, rows in zip(axes, (changing[: len(METHODS)], changing[-len(METHODS) :]), strict=True):
        for row in rows:
            if row["curve"] is not None:
                steps = range(0, THIN * len(row["curve"]), THIN)
                axis.semilogy(steps, row["curve"], label=f"{row['method']}, lr {row['lr']}", linewidth=1)
        axis.set(xlabel="step", ylabel="error to the minimum")
        axis.set_title(f"condition {rows[0]['condition']:g}, serial {rows[0]['serial']:g}", fontsize=9)
        axis.legend(fontsize=7)
    save(figure, path)
