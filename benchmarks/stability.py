"""Stability of training: `python -m benchmarks.stability [length|table|rates|all]`.

Trains hope-tiny (or a variant of it) and records, at every step, the loss and the norm of the outer gradient
before clipping. Three questions (all also asked by tests/test_stability.py):

- `length`: at T = 4,096 (128 chunks of 32) the gradient passes through 128 writes of every memory;
- `table`: the same for every memory of the table, 300 steps, chunk 64, in a model of 2 layers and width 64;
- `rates`: 2,000 steps of 1,024 tokens at learning rates 1e-3, 3e-3 and 1e-2, with memories of expansion 4,
  and with momentum.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from nested_learning import HopeForCausalLM
from nested_learning._files import replacing, write_text
from nested_learning.layers import MIXERS, ComposedMemory, MemoryLayer
from nested_learning.models.presets import preset
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import DataConfig, build_data
from nested_learning.training.optim import build_optimizer, build_schedule
from nested_learning.training.report import hardware, versions


@dataclass(kw_only=True)
class Run:
    """One training run: `batch_size` sequences of `length` bytes per step.

    `horizon` is the length of the learning-rate schedule, of which `steps` are run.
    """

    name: str
    lr: float
    steps: int
    length: int
    batch_size: int
    mixer: str = "self_modifying_titans"
    options: dict[str, Any] = field(default_factory=lambda: {"chunk_size": 32})  # keywords of the mixer
    shape: dict[str, int] = field(default_factory=dict)  # fields of the model that differ from hope-tiny's
    seed: int = 0
    source: str = "stdlib"
    horizon: int | None = None


@dataclass(kw_only=True)
class Trace:
    """Loss in nats per byte, and outer gradient norm before clipping, of each step."""

    losses: list[float]
    gradient_norms: list[float]

    @property
    def first_bad_step(self) -> int | None:
        """The first step with a loss or gradient norm that is NaN or infinite."""
        pairs = zip(self.losses, self.gradient_norms, strict=True)
        return next((i for i, pair in enumerate(pairs) if not all(map(math.isfinite, pair))), None)


LENGTH = [Run(name="T 4096, lr 5e-3", lr=5e-3, steps=80, length=4096, batch_size=1, horizon=200)]
RATES = [
    *(Run(name=f"lr {lr:g}", lr=lr, steps=2000, length=256, batch_size=4) for lr in (1e-3, 3e-3, 1e-2)),
    Run(
        name="expansion 4",
        lr=1e-2,
        steps=2000,
        length=256,
        batch_size=4,
        options={"chunk_size": 32, "expansion": 4.0},
    ),
    Run(
        name="momentum",
        lr=1e-2,
        steps=2000,
        length=256,
        batch_size=4,
        options={"chunk_size": 32, "momentum": True},
    ),
]
# They only add, so that a run of one byte makes W as large as the run is long; where its key and query are
# nearly orthogonal, the normalised answer, and its gradient, hang on a small difference (docs/log.md).
ADDITIVE = ("linear_attention", "retnet")
TABLE = [
    Run(
        name=mixer,
        lr=3e-3 if mixer in ADDITIVE else 5e-3,
        steps=300,
        length=4096,
        batch_size=1,
        mixer=mixer,
        options={"chunk_size": 64},
        shape={"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2},
    )
    for mixer, factory in sorted(MIXERS.items())
    if isinstance(factory, type) and issubclass(factory, MemoryLayer) and factory is not ComposedMemory
]


def train(run: Run, progress: bool = False) -> Trace:
    """Losses and gradient norms of a run, which stops at the first value that is not finite."""
    torch.manual_seed(run.seed)
    options = {run.mixer: run.options}
    config = preset("hope-tiny", mixer=run.mixer, mixer_options=options, **run.shape)
    model = HopeForCausalLM(config).train()
    optim = OptimConfig(lr=run.lr, schedule="linear")
    steps = run.horizon or run.steps
    optimizer = build_optimizer(model, optim)
    schedule = build_schedule(optimizer, optim, steps)
    data = build_data(
        DataConfig(source=run.source, block_size=run.length, seed=run.seed), run.steps * run.batch_size
    )
    trace = Trace(losses=[], gradient_norms=[])
    for step, batch in enumerate(DataLoader(data.train, batch_size=run.batch_size)):
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        trace.losses.append(loss.item())
        trace.gradient_norms.append(norm.item())
        if trace.first_bad_step is not None:
            break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress and (step + 1) % max(1, run.steps // 10) == 0:
            print(
                f"{run.name}: step {step + 1}, loss {loss.item():.3f}, gradient norm {norm.item():.3f}",
                flush=True,
            )
    return trace


def plot(traces: dict[str, Trace], path: Path) -> None:
    """Loss and gradient norm over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), constrained_layout=True)
    for name, trace in traces.items():
        above.plot(trace.losses, label=name, linewidth=1)
        below.semilogy(trace.gradient_norms, label=name, linewidth=1)
    above.set_ylabel("training loss, nats per byte")
    above.legend()
    below.axhline(10, color="grey", linestyle="--", linewidth=1)
    below.set_ylabel("outer gradient norm before clipping")
    below.set_xlabel("optimizer step")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def summary(run: Run, trace: Trace) -> dict[str, Any]:
    """Settings of a run, its losses at both ends and its gradient norms after the warm-up."""
    late = trace.gradient_norms[20:] or trace.gradient_norms
    return {
        **asdict(run),
        "steps_done": len(trace.losses),
        "first_bad_step": trace.first_bad_step,
        "loss_first_10": sum(trace.losses[:10]) / len(trace.losses[:10]),
        "loss_last_10": sum(trace.losses[-10:]) / len(trace.losses[-10:]),
        "largest_gradient_norm_after_20_steps": max(late),
        "median_gradient_norm_after_20_steps": sorted(late)[len(late) // 2],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=["length", "table", "rates", "all"], nargs="?", default="all")
    parser.add_argument("--only", help="run only the runs whose name contains this")
    parser.add_argument("--plot", type=Path, help="write a PNG of losses and gradient norms")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args(arguments)
    runs = {"length": LENGTH, "table": TABLE, "rates": RATES, "all": LENGTH + TABLE + RATES}[given.question]
    runs = [run for run in runs if not given.only or given.only in run.name]
    traces = {run.name: train(run, progress=True) for run in runs}
    result = {
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
        "runs": [summary(run, traces[run.name]) for run in runs],
    }
    print(json.dumps(result, indent=2))
    if given.json:
        write_text(given.json, json.dumps(result, indent=2) + "\n")
    if given.plot:
        plot(traces, given.plot)


if __name__ == "__main__":
    main()
