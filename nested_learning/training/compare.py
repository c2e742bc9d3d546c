"""Models side by side: the same batches, one step of each in turn, in one process.

Interleaving makes the comparison of speeds fair on a machine that is busy with other things, and every
model of a seed sees exactly the same text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from nested_learning._checks import (
    check_fields,
    check_types,
    expected,
    fits,
    require,
    require_folder_name,
    require_seed,
)
from nested_learning._files import make_folder
from nested_learning._progress import Progress, progress
from nested_learning.models import preset
from nested_learning.training.carried import CarriedRows, carried_rows
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import to_dict
from nested_learning.training.contestants import Contestant, contestant
from nested_learning.training.data import DataBundle, DataConfig, bits_per_byte, build_data
from nested_learning.training.grid import check_grid, settings_of, tuned
from nested_learning.training.memory_probe import step_memory
from nested_learning.training.models import model_config, new_model
from nested_learning.training.optim import build_optimizer, build_schedule, rehearse
from nested_learning.training.positions import loss_by_position, mean_score, score_both_ways
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, versions
from nested_learning.training.run_cache import RunCache
from nested_learning.training.search import TUNING_SEED, Found, SearchClock, search


@dataclass(kw_only=True)
class CompareConfig:
    """The models of a comparison, their data and the length of their training.

    Args:
        models: contestants: presets or training YAMLs, each as it is or with an optimizer, MODEL:OPTIMIZER;
            see `contestants.contestant`
        data: the text; its `seed` and `max_validation_blocks` follow from `seeds` and `validation_batches`
        optim: optimizer and schedule, for each of `lrs`
        lrs: peak learning rates to try; per model the one with the best mean validation loss is marked. One
            with a `grid`
        seeds: each gives another initialisation and another order of the data
        grid: values to try by key, such as {"optim.lr": [3e-3, 1e-2]}: fields of `optim`,
            `optim.options.NAME` and `model.FIELD`. Every model tries all settings at `tuning_seed` and runs
            `seeds` with its best
        tuning_seed: seed of its own on which the settings of `grid` are compared; default 1000
        budget_minutes: time for all runs of a `grid`; what does not fit is left out, for all models alike,
            but a first setting and one seed always run. Memory is measured afterwards
        steps: optimizer steps of each run
        batch_size: sequences per step
        validation_batches: batches of `batch_size` sequences in the final validation
        memory: also measure the memory of a training step, each model alone in a fresh process
        cache: folder in which every finished run is kept, so that a comparison goes on from there; the runs
            of another version of torch or of this package, on another kind of device or with other settings
            are others. A change of code between two versions is not noticed: then choose another folder
    """

    models: list[str]
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(schedule="linear"))
    lrs: list[float] = field(default_factory=lambda: [3e-3])
    seeds: list[int] = field(default_factory=lambda: [0])
    grid: dict[str, list[Any]] = field(default_factory=dict)
    tuning_seed: int | None = None
    budget_minutes: float | None = None
    steps: int = 200
    batch_size: int = 16
    validation_batches: int = 20
    memory: bool = True
    cache: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, how in (("models", "the models"), ("lrs", "--lr"), ("seeds", "--seeds")):
            values = getattr(self, name)
            distinct = len(set(values)) == len(values) > 0
            require(distinct, name.removesuffix("s"), values, "one or more values, all different", how)
        for seed in self.seeds:
            require_seed(seed, "--seeds")
        require_folder_name("cache", self.cache)
        for name in ("steps", "batch_size", "validation_batches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        self._check_search()
        for lr in self.lrs:
            dataclasses.replace(self.optim, lr=lr).warmup(self.steps)  # ValueError for what does not fit

    def _check_search(self) -> None:
        """ValueError for a search that does not fit, or parts of one without a grid."""
        if not self.grid:
            for name in ("tuning_seed", "budget_minutes"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but there is no grid to search: give one "
                        "(--grid 'optim.lr=3e-3,1e-2'), or leave it away"
                    )
            return
        check_grid(self.grid)
        if len(self.lrs) > 1 or ("optim.lr" in self.grid and self.lrs != [OptimConfig.lr]):
            raise ValueError(
                f"lr is {self.lrs} beside a grid; expected the rates of a search in the grid itself: "
                "--grid 'optim.lr=3e-3,1e-2'"
            )
        self.tuning_seed = TUNING_SEED if self.tuning_seed is None else self.tuning_seed
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed is {self.tuning_seed}, which is one of seeds {self.seeds}: a setting that was "
                "chosen on a seed looks better there than it is; expected another one"
            )
        if self.budget_minutes is not None:
            budget = self.budget_minutes
            require(0 < budget < math.inf, "budget_minutes", budget, "a positive number of minutes")


class Contender:
    """One model in training: its parameters, optimizer, schedule and measurements.

    Args:
        name: its name in the results.
        model: the model, trained in place.
        optim: schedule, clipping and, without `optimizer`, the optimizer.
        steps: length of the schedule in optimizer steps.
        optimizer: an optimizer of the model's parameters at the peak rate.
        tokens_per_row: tokens of a row, for levels with the period "chunk".
        carried: where the states of its rows are kept from block to block; None: they are not carried.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        optim: OptimConfig,
        steps: int,
        optimizer: Optimizer | None = None,
        tokens_per_row: int | None = None,
        carried: CarriedRows | None = None,
    ) -> None:
        self.name = name
        self.carried = carried
        self.model = model
        self.optimizer = optimizer or build_optimizer(model, optim, tokens_per_row)
        self.schedule = build_schedule(self.optimizer, optim, steps)
        self.max_grad_norm = optim.whole_norm
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


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train every model with every learning rate and seed, or with its best setting of a grid.

    Args:
        config: the comparison.

    Returns:
        A dict fit for JSON: "models" has a summary per model in the order given, "runs" each single run. With
        a grid a summary has the chosen "setting" and all "settings" that were tried, and "search" says at
        which seed, for how long, and what the budget left out.

    Raises:
        ValueError: an unknown preset, optimizer, part or key, a text that does not fit, or a cache that is
            no folder.
        OSError: the folder of the cache cannot be written.
    """
    contestants = [contestant(name, config.optim) for name in config.models]
    settings = settings_of(config.grid)
    for each, setting in itertools.product(contestants, settings):
        one = tuned(each, setting)
        one.optim.warmup(config.steps)
        rehearse(preset(one.preset, **one.overrides), one.optim, config.data.block_size, config.steps)
    if (folder := RunCache(config.cache).folder) is not None:
        make_folder(folder, "--cache")  # what cannot be written is said before the first run
    count = len(settings) + len(config.seeds) if config.grid else len(config.lrs) * len(config.seeds)
    found = None
    with progress("comparing", config.steps * count, "step") as bar:
        rounds = _Rounds(config, bar)
        if config.grid:
            assert config.tuning_seed is not None
            contestants = [tuned(each, {"optim.lr": config.lrs[0]}) for each in contestants]
            clock = SearchClock(config.budget_minutes, config.steps)
            found = search(contestants, config.grid, config.tuning_seed, config.seeds, rounds, clock)
            runs = found.runs
            contestants = [tuned(each, found.best[each.name] or {}) for each in contestants]
        else:
            runs = [
                run
                for seed in config.seeds
                for lr in config.lrs
                for run in rounds.run([tuned(each, {"optim.lr": lr}) for each in contestants], seed)
            ]
    device, shape = process_state().device, (config.batch_size, config.data.block_size)
    memory: dict[str, int | None] = dict.fromkeys(each.name for each in contestants)
    if config.memory:
        with progress("measuring memory", len(contestants), "model") as bar:
            for each in contestants:
                memory[each.name] = _memory(config, each, rounds.last, str(device))
                bar.advance()
    return {
        "format": "nested_learning.comparison",
        "version": 1,
        "config": to_dict(config),
        "versions": versions(),
        "hardware": hardware(device),
        "data": rounds.last.summary,
        "models": _summaries(config, runs, found, math.prod(shape), memory),
        "runs": runs,
        "search": found and found.to_dict(config.tuning_seed, config.budget_minutes),  # type: ignore[arg-type]
    }


class _Rounds:
    """Rounds of a comparison: the contestants of one take turns on the data of its seed."""

    def __init__(self, config: CompareConfig, bar: Progress) -> None:
        self.config, self.bar = config, bar
        self._data: tuple[int, DataBundle] | None = None

    @property
    def last(self) -> DataBundle:
        """Data of the last round."""
        assert self._data is not None
        return self._data[1]

    def run(self, contestants: list[Contestant], seed: int, label: str = "") -> list[dict[str, Any]]:
        self.bar.what = label or self.bar.what
        return _round(self._at(contestants, seed), self.bar)

    def skip(self) -> None:
        if self.bar.total:
            self.bar.total -= self.config.steps

    def finished(self, contestants: list[Contestant], seed: int) -> bool:
        if self.config.cache is None:
            return False
        this, cache = self._at(contestants, seed), RunCache(self.config.cache)
        device = process_state().device
        return all(cache.find(this.key(each, device), _check_run) is not None for each in contestants)

    def _at(self, contestants: list[Contestant], seed: int) -> _Round:
        config = self.config
        if self._data is None or self._data[0] != seed:
            data = dataclasses.replace(
                config.data,
                seed=config.data.seed + seed,
                max_validation_blocks=config.validation_batches * config.batch_size,
            )
            self._data = seed, build_data(data, config.steps * config.batch_size, config.batch_size)
        return _Round(config, contestants, seed, self.last)


def _summaries(
    config: CompareConfig,
    runs: list[dict[str, Any]],
    found: Found | None,
    tokens_per_step: int,
    memory: dict[str, int | None],
) -> list[dict[str, Any]]:
    """`summarise`, and with a search what each model tried; one that always diverged has those runs alone."""
    if found is None:
        return summarise(runs, tokens_per_step, memory)
    lost = [run for run in found.tried if found.best[run["model"]] is None]
    rows = {row["model"]: row for row in summarise([*runs, *lost], tokens_per_step, memory)}
    return [
        {**rows[name], "setting": found.best[name], "settings": found.settings_of(name)}
        for name in config.models
    ]


@dataclass(frozen=True)
class _Round:
    """Runs of all contestants at one seed: they take turns."""

    config: CompareConfig
    contestants: list[Contestant]
    seed: int
    bundle: DataBundle

    def key(self, each: Contestant, device: torch.device) -> dict[str, Any]:
        """All that decides the run of a contestant."""
        config = self.config
        return {
            "what": "run",
            "model": model_config(each.preset, each.overrides, self.bundle.tokenizer).to_dict(),
            "optim": to_dict(each.optim),
            "seed": self.seed,
            "data": {**to_dict(config.data), **self.bundle.summary},
            **{name: getattr(config, name) for name in ("steps", "batch_size", "validation_batches")},
            **_surroundings(device),
        }


def _surroundings(device: torch.device | str) -> dict[str, Any]:
    """What decides the figures of a run besides its settings."""
    names = ("nested_learning", "torch", "transformers", "python")
    return {"device": torch.device(device).type, "versions": {name: versions()[name] for name in names}}


def _round(this: _Round, bar: Progress) -> list[dict[str, Any]]:
    """The runs of a round, one step of each in turn; those that were finished before are not run again."""
    config, bundle, device = this.config, this.bundle, process_state().device
    cache = RunCache(config.cache)
    keys = {each.name: this.key(each, device) for each in this.contestants}
    found = {name: cache.find(key, _check_run) for name, key in keys.items()}
    contenders = []
    for each in this.contestants:
        if found[each.name] is None:
            model = new_model(model_config(each.preset, each.overrides, bundle.tokenizer), this.seed)
            rows = config.data.block_size
            carried = carried_rows(model.to(device), bundle.train)
            contenders.append(
                Contender(each.name, model, each.optim, config.steps, tokens_per_row=rows, carried=carried)
            )
    if contenders:
        for batch in batches(bundle.train, config.batch_size, device):
            for contender in contenders:
                contender.step(batch)
            bar.advance()
    elif bar.total:
        bar.total -= config.steps
    rates = {each.name: each.optim.lr for each in this.contestants}
    for contender in contenders:
        run = _run_of(contender, rates[contender.name], this.seed, bundle, config, device)
        found[contender.name] = cache.keep(keys[contender.name], run)
    return [{**found[each.name], "model": each.name} for each in this.contestants]


def _memory(config: CompareConfig, each: Contestant, bundle: DataBundle, device: str) -> int:
    """Bytes of a training step of a contestant; see `step_memory`."""
    fields = model_config(each.preset, each.overrides, bundle.tokenizer).to_dict()
    shape = (config.batch_size, config.data.block_size)
    key = {"what": "memory", "model": fields, "optim": to_dict(each.optim), "shape": list(shape)}
    key |= _surroundings(device)

    def check(kept: Any) -> None:
        require(fits(kept, int), "memory", kept, expected(int))

    cache = RunCache(config.cache)
    found: int = cache.get(key, lambda: step_memory(fields, shape, device, each.optim), check)
    return found


def _check_run(kept: Any) -> None:
    """Raise ValueError for a run in the cache that is not as `_run_of` makes it."""
    number = float | None
    kinds = {"lr": float, "seed": int, "parameters": int, "nats_per_token": number, "bits_per_byte": number}
    kinds |= {"positions": dict | None, "median_step_seconds": number, "train_losses": list}
    check_fields(kept, kinds, optional=("positions",))


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
