"""Models side by side: the same batches, one step of each in turn, in one process.

Interleaving makes the comparison of speeds fair on a machine that is busy with other things, and every
model of a seed sees exactly the same text.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from nested_learning._checks import check_types, require
from nested_learning.training.carried import CarriedRows, carried_rows
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import to_dict
from nested_learning.training.data import DataBundle, DataConfig, bits_per_byte, build_data
from nested_learning.training.memory_probe import step_memory
from nested_learning.training.models import model_config, new_model, preset_or_yaml
from nested_learning.training.optim import build_optimizer, build_schedule
from nested_learning.training.positions import loss_by_position, mean_score, score_both_ways
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, versions


@dataclass(kw_only=True)
class CompareConfig:
    """The models of a comparison, their data and the length of their training.

    Args:
        models: presets, or training YAMLs of which the keys `preset` and `model` count
        data: the text; its `seed` and `max_validation_blocks` follow from `seeds` and `validation_batches`
        optim: optimizer and schedule, for each of `lrs`
        lrs: peak learning rates to try; per model the one with the best mean validation loss is marked
        seeds: each gives another initialisation and another order of the data
        steps: optimizer steps of each run
        batch_size: sequences per step
        validation_batches: batches of `batch_size` sequences in the final validation
        memory: also measure the memory of a training step, each model alone in a fresh process
    """

    models: list[str]
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(schedule="linear"))
    lrs: list[float] = field(default_factory=lambda: [3e-3])
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 200
    batch_size: int = 16
    validation_batches: int = 20
    memory: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("models", "lrs", "seeds"):
            values = getattr(self, name)
            distinct = len(set(values)) == len(values) > 0
            require(distinct, name.removesuffix("s"), values, "one or more values, all different")
        for name in ("steps", "batch_size", "validation_batches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        for lr in self.lrs:
            dataclasses.replace(self.optim, lr=lr).warmup(self.steps)  # ValueError for what does not fit


class Contender:
    """One model in training: its parameters, optimizer, schedule and measurements.

    Args:
        name: its name in the results.
        model: the model, trained in place.
        optim: schedule, clipping and, without `optimizer`, the hyperparameters of AdamW.
        steps: length of the schedule in optimizer steps.
        optimizer: an optimizer of the model's parameters at the peak rate, in place of AdamW.
        carried: where the states of its rows are kept from block to block; None: they are not carried.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        optim: OptimConfig,
        steps: int,
        optimizer: Optimizer | None = None,
        carried: CarriedRows | None = None,
    ) -> None:
        self.name = name
        self.carried = carried
        self.model = model
        self.optimizer = optimizer or build_optimizer(model, optim)
        self.schedule = build_schedule(self.optimizer, optim, steps)
        self.max_grad_norm = optim.max_grad_norm
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.diverged_at: int | None = None

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step. After a loss that is not finite the model stands still."""
        if self.diverged_at is not None:
            return
        start = time.perf_counter()
        loss = self.model.train()(**(batch if self.carried is None else self.carried.enter(batch))).loss
        loss.backward()
        if self.carried is not None:
            self.carried.leave()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        value = loss.item()
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            self.diverged_at = len(self.losses) + 1
            return
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        synchronize(loss.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)

    @torch.no_grad()
    def validate(self, batches: Iterable[dict[str, Tensor]]) -> float | None:
        """Mean loss in nats per token over equal batches; None for a model that diverged."""
        if self.diverged_at is not None:
            return None
        self.model.eval()
        value = fmean(self.model(**batch, use_cache=False).loss.item() for batch in batches)
        return value if math.isfinite(value) else None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(config: CompareConfig, on_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train every model with every learning rate and seed.

    Args:
        config: the comparison.
        on_step: called after each step of a round of models; there are steps · lrs · seeds of them.

    Returns:
        A dict fit for JSON: "models" has a summary per model in the order given, "runs" each single run.

    Raises:
        ValueError: an unknown preset or key, or a text that does not fit.
    """
    device = process_state().device
    chosen = {name: preset_or_yaml(name) for name in config.models}
    runs: list[dict[str, Any]] = []
    for seed in config.seeds:
        data = dataclasses.replace(
            config.data,
            seed=config.data.seed + seed,
            max_validation_blocks=config.validation_batches * config.batch_size,
        )
        bundle = build_data(data, config.steps * config.batch_size, config.batch_size)
        model_configs = {name: model_config(*each, bundle.tokenizer) for name, each in chosen.items()}
        for lr in config.lrs:
            optim = dataclasses.replace(config.optim, lr=lr)
            contenders = [
                Contender(name, model, optim, config.steps, carried=carried_rows(model, bundle.train))
                for name, each in model_configs.items()
                for model in [new_model(each, seed).to(device)]
            ]
            for batch in batches(bundle.train, config.batch_size, device):
                for contender in contenders:
                    contender.step(batch)
                on_step()
            runs += [_run_of(contender, lr, seed, bundle, config, device) for contender in contenders]
    shape = (config.batch_size, config.data.block_size)
    memory = {
        name: step_memory(each.to_dict(), shape, str(device)) if config.memory else None
        for name, each in model_configs.items()
    }
    return {
        "format": "nested_learning.comparison",
        "version": 1,
        "config": to_dict(config),
        "versions": versions(),
        "hardware": hardware(device),
        "data": bundle.summary,
        "models": summarise(runs, config.batch_size * config.data.block_size, memory),
        "runs": runs,
    }


def batches(data: Dataset, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` samples on the device; a last one that is smaller is left out."""
    for batch in DataLoader(data, batch_size=size, drop_last=True):
        yield {key: value.to(device) for key, value in batch.items()}


def _run_of(
    contender: Contender,
    lr: float,
    seed: int,
    bundle: DataBundle,
    config: CompareConfig,
    device: torch.device,
) -> dict[str, Any]:
    size, block_size = min(config.batch_size, len(bundle.validation)), config.data.block_size
    if bundle.carried and contender.diverged_at is None:
        found = loss_by_position(contender.model, bundle.carried, block_size, True, size)["nats_per_token"]
        nats = found if math.isfinite(found) else None
    else:
        nats = contender.validate(batches(bundle.validation, size, device))
    scored = bundle.scored and nats is not None
    return {
        "model": contender.name,
        "lr": lr,
        "seed": seed,
        "parameters": contender.model.num_parameters(),
        "nats_per_token": nats,
        "bits_per_byte": None if nats is None else bits_per_byte(nats, bundle.bytes_per_token),
        "positions": score_both_ways(contender.model, bundle.scored, block_size, size) if scored else None,
        "diverged_at": contender.diverged_at,
        "median_step_seconds": median(contender.seconds) if contender.seconds else None,
        "train_losses": contender.losses,
    }


def summarise(
    runs: list[dict[str, Any]], tokens_per_step: int, memory: dict[str, int | None]
) -> list[dict[str, Any]]:
    """Per model: each learning rate's mean validation loss over the seeds, the best one, speed and size.

    A learning rate at which any seed diverged has no mean. The speed is relative to the last model.
    """
    names = list(dict.fromkeys(run["model"] for run in runs))
    rows = [_summary_of(name, [r for r in runs if r["model"] == name], tokens_per_step) for name in names]
    last = rows[-1]["tokens_per_second"]
    for row in rows:
        speed = row["tokens_per_second"]
        row["relative_speed"] = speed / last if speed and last else None
        row["step_memory_bytes"] = memory[row["model"]]
    return rows


def _summary_of(name: str, runs: list[dict[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    rates = []
    for lr in dict.fromkeys(run["lr"] for run in runs):
        of_rate = [run for run in runs if run["lr"] == lr]
        whole = all(run["nats_per_token"] is not None for run in of_rate)
        rates.append(
            {
                "lr": lr,
                "seeds": len(of_rate),
                **{
                    key: fmean(run[key] for run in of_rate) if whole else None
                    for key in ("nats_per_token", "bits_per_byte")
                },
                "diverged": sum(run["nats_per_token"] is None for run in of_rate),
            }
        )
    finite = [rate for rate in rates if rate["nats_per_token"] is not None]
    best = min(finite, key=lambda rate: rate["nats_per_token"]) if finite else None
    seconds = [run["median_step_seconds"] for run in runs if run["median_step_seconds"]]
    step_seconds = median(seconds) if seconds else None
    scores = [run["positions"] for run in runs if best and run["lr"] == best["lr"] and run.get("positions")]
    return {
        "model": name,
        "parameters": runs[0]["parameters"],
        "best_lr": best and best["lr"],
        "nats_per_token": best and best["nats_per_token"],
        "bits_per_byte": best and best["bits_per_byte"],
        "positions": mean_score(scores) if scores else None,
        "rates": rates,
        "median_step_seconds": step_seconds,
        "tokens_per_second": tokens_per_step / step_seconds if step_seconds else None,
    }
