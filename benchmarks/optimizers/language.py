"""Language models at equal steps: AdamW, Muon, M3, DMGD and DeltaMomentum, each at its own learning rate.

All optimizers of a seed start from the same weights and read the same batches, with the same schedule and
clipping and without weight decay. The learning rate is the one of its grid from which no neighbour has a
lower validation loss at the first seed; the search begins in the middle, with the second model at the
choice for the first. Then, on fixed gradients, `step()` alone is timed, in turn, and the state counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.common import Cache, Claim, below, edge, mean, new_figure, plus_minus, save, search, spread
from benchmarks.harness import interleaved, show
from benchmarks.optimizers.contestants import NETWORK, NETWORK_RATES, split
from nested_learning import HopeForCausalLM
from nested_learning.models.presets import preset
from nested_learning.optimizers.base import tensor_bytes
from nested_learning.optimizers.recipe import decayed_names
from nested_learning.training.compare import Contender, batches
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import DataBundle, DataConfig, build_data
from nested_learning.training.models import model_config, new_model

CPU = torch.device("cpu")
MODELS = ("transformer-tiny", "hope-tiny")
BLOCK = 10  # steps timed together: M3 reads its slow momentum in one of ten
TARGET = 1.3  # M3's step() over Muon's


@dataclass(frozen=True, kw_only=True)
class Size:
    steps: int = 200
    batch_size: int = 8
    block_size: int = 256
    validation_batches: int = 20
    repeats: int = 15  # timed blocks of `step()`
    shape: dict[str, Any] = field(default_factory=dict)  # fields of the model's configuration


QUICK = Size(
    steps=4,
    batch_size=2,
    block_size=32,
    validation_batches=2,
    repeats=2,
    shape={"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2},
)


def optimizer_of(name: str, model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer `name` at the peak rate of `optim`; maps of hidden vectors are its matrices."""
    named = dict(model.named_parameters())
    matrices = {n for n in decayed_names(model) if named[n].ndim == 2}
    return NETWORK[name](*split(model, matrices), optim.lr, optim.betas)


@dataclass
class Bench:
    """One model on one text: trains rounds of optimizers, remembering what was run before."""

    model: str
    source: str
    size: Size
    cache: Cache

    def result(self, optimizer: str, lr: float, seed: int) -> dict[str, Any]:
        """The validation loss (None if it diverged) and the training losses."""
        size = dataclasses.asdict(self.size)
        settings = {"part": "language", "model": self.model, "source": self.source, **size}
        settings |= {"optimizer": optimizer, "lr": lr, "seed": seed}
        return self.cache.get(settings, lambda: self._train(optimizer, lr, seed))

    def tuned(self, optimizer: str, grid: list[float], start: float, seed: int) -> float:
        """The learning rate found on the grid."""
        return search(grid, lambda lr: self.result(optimizer, lr, seed)["loss"], start)

    def _train(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        size, bundle = self.size, self._data(seed)
        model = new_model(model_config(self.model, self.size.shape, bundle.tokenizer), seed)
        optim = OptimConfig(lr=lr, schedule="linear")
        contender = Contender(name, model, optim, size.steps, optimizer_of(name, model, optim))
        for batch in batches(bundle.train, size.batch_size, CPU):
            contender.step(batch)
        loss = contender.validate(batches(bundle.validation, size.batch_size, CPU))
        return {"loss": loss, "curve": [round(x, 4) for x in contender.losses]}

    def _data(self, seed: int) -> DataBundle:
        size = self.size
        blocks = size.validation_batches * size.batch_size
        data = DataConfig(
            source=self.source, block_size=size.block_size, seed=seed, max_validation_blocks=blocks
        )
        return build_data(data, size.steps * size.batch_size)

    def costs(self) -> dict[str, dict[str, Any]]:
        """Seconds of a `step()` and bytes of state per optimizer; all step the same model in turn."""
        settings = {"part": "language", "model": self.model, "shape": self.size.shape, "block": BLOCK}
        repeats = self.size.repeats
        return self.cache.get(
            {**settings, "repeats": repeats, "threads": torch.get_num_threads()}, self._costs
        )

    def _costs(self) -> dict[str, dict[str, Any]]:
        torch.manual_seed(0)
        model = HopeForCausalLM(preset(self.model, **self.size.shape))
        ids = torch.randint(0, 256, (1, 64))
        model(ids, labels=ids).loss.backward()
        optim = OptimConfig(lr=1e-6)
        optimizers = {name: optimizer_of(name, model, optim) for name in NETWORK}
        works: dict[str, Callable[[], object]] = {n: _block(o.step) for n, o in optimizers.items()}
        torch_muon = _torch_muon(model, optim)
        works["torch.optim.Muon"] = _block(lambda: [optimizer.step() for optimizer in torch_muon])
        seconds = interleaved(works, self.size.repeats)
        states = {name: tensor_bytes(list(o.state.values())) for name, o in optimizers.items()}
        states["torch.optim.Muon"] = sum(tensor_bytes(list(o.state.values())) for o in torch_muon)
        return {name: {"step_seconds": seconds[name] / BLOCK, "state_bytes": states[name]} for name in works}


def _block(step: Callable[[], object]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(BLOCK):
            step()

    return steps


def _torch_muon(model: nn.Module, optim: OptimConfig) -> list[Optimizer]:
    """torch's Muon for the matrices and its AdamW for the rest, for the time of a step."""
    named = dict(model.named_parameters())
    matrices, rest = split(model, {n for n in decayed_names(model) if named[n].ndim == 2})
    return [torch.optim.Muon(matrices, lr=optim.lr), torch.optim.AdamW(rest, lr=optim.lr)]


def run(seeds: list[int], quick: bool, cache: Cache, source: str) -> dict[str, Any]:
    """Tune every optimizer at the first seed, then train it with the others."""
    size = QUICK if quick else Size()
    grids = {name: grid[1:3] if quick else grid for name, grid in NETWORK_RATES.items()}
    figures = {
        "part": "language",
        "source": source,
        **dataclasses.asdict(size),
        "seeds": seeds,
        "rates": grids,
    }
    rows, curves = [], {}
    start = {name: grid[(len(grid) - 1) // 2] for name, grid in grids.items()}
    for model in MODELS:
        bench = Bench(model, source, size, cache)
        for name, grid in grids.items():
            start[name] = bench.tuned(name, grid, start[name], seeds[0])
        found = {name: [bench.result(name, start[name], seed) for seed in seeds] for name in grids}
        costs = bench.costs()
        for name, results in found.items():
            losses = [result["loss"] for result in results]
            row: dict[str, Any] = {"model": model, "optimizer": name, "lr": edge(start[name], grids[name])}
            row |= {"loss": mean(losses), "± loss": spread(losses), "losses": losses}
            time = costs[name]["step_seconds"]
            row |= {"ms per step()": 1e3 * time, "/ Muon's": time / costs["Muon"]["step_seconds"]}
            rows.append({**row, "state bytes": costs[name]["state_bytes"]})
        curves[model] = {name: [result["curve"] for result in results] for name, results in found.items()}
        figures[f"torch.optim.Muon, ms per step() on {model}"] = (
            1e3 * costs["torch.optim.Muon"]["step_seconds"]
        )
    return {**figures, "rows": rows, "curves": curves, "claims": _claims(rows)}


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    claims: list[Claim] = []
    for model in MODELS:
        row = {row["optimizer"]: row for row in rows if row["model"] == model}
        ratio = row["M3"]["/ Muon's"]
        losses = ", ".join(f"{name} {plus_minus(each, 'loss')}" for name, each in row.items())
        claims += [
            {
                "claim": f"{model}: M3's loss is not above Muon's",
                "holds": not below(row["Muon"]["loss"], row["M3"]["loss"]),
                "because": losses,
            },
            {
                "claim": f"{model}: M3's step() takes at most {TARGET} times as long as Muon's",
                "holds": ratio <= TARGET,
                "because": f"{ratio:.2f} times",
            },
        ]
    return claims


def display(figures: dict[str, Any]) -> None:
    columns = ("ms per step()", "/ Muon's", "state bytes")
    rows = [
        {
            **{key: row[key] for key in ("model", "optimizer", "lr")},
            "validation loss, nats": plus_minus(row, "loss"),
            **{key: row[key] for key in columns},
        }
        for row in figures["rows"]
    ]
    runs = f"{figures['steps']} steps, {len(figures['seeds'])} seeds"
    show(f"{Path(figures['source']).name}, {runs} (* end of the grid)", rows)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Training loss, mean over seeds and over ten steps."""
    figure, axes = new_figure(len(MODELS), width=4.6)
    for axis, model in zip(axes, MODELS, strict=True):
        for name, curves in figures["curves"][model].items():
            length = min(map(len, curves))
            smooth = torch.tensor([curve[:length] for curve in curves]).mean(0)
            if length >= BLOCK:
                smooth = smooth.unfold(0, BLOCK, 1).mean(1)
            axis.plot(smooth, label=name, linewidth=1)
        axis.set(xlabel="step", ylabel="training loss (nats per byte)", title=model)
        axis.legend(fontsize=7)
    save(figure, path)
