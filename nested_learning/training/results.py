"""The results of a finished run: the model, the plot and result.json."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from nested_learning._files import whole_folder
from nested_learning.levels import levels
from nested_learning.training.compiling import run_plainly
from nested_learning.training.config_file import to_dict
from nested_learning.training.data import DataBundle, bits_per_byte
from nested_learning.training.positions import curves
from nested_learning.training.process import whole_model
from nested_learning.training.report import (
    Curve,
    hardware,
    peak_memory,
    plot_losses,
    plot_positions,
    versions,
)
from nested_learning.training.run_folder import RunFolder, write_json
from nested_learning.training.trainer import HopeTrainer

PROMPT_TOKENS = 32
TRIED_TOKENS = 8  # by which the time of a sample is foretold


def write_results(
    trainer: HopeTrainer,
    folder: RunFolder,
    bundle: DataBundle,
    step_seconds: list[float],
    scores: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write `model/`, the plots and, last, `result.json`, which marks the run as complete.

    All processes have to call it, as the model may lie in shards; the main one writes.

    Args:
        trainer: the trainer, after training.
        folder: the run's folder.
        bundle: the data of the run.
        step_seconds: seconds of each step taken by this process.
        scores: loss by position of the trained model, as `score_both_ways` gives it.

    Returns:
        The contents of result.json; None in other processes.
    """
    memory, model = peak_memory(trainer.args.device), whole_model(trainer.lm)
    if not trainer.is_world_process_zero():
        return None
    config = trainer.config
    model.config.use_cache = True  # the Trainer turned it off for training
    run_plainly(model)
    with whole_folder(folder.model, folder.standing()) as target:
        model.save_pretrained(target)
        bundle.tokenizer.save_pretrained(target)
    train, validation = _plot(trainer, folder, scores)
    tokens = config.batch_size * config.data.block_size * len(step_seconds)
    result = {
        "format": "nested_learning.result",
        "version": 1,
        "config": to_dict(config),
        "versions": versions(),
        "hardware": hardware(trainer.args.device, trainer.args.world_size),
        "seed": config.seed,
        "data": bundle.summary | _samples_read(trainer, bundle),
        "parameters": model.num_parameters(),
        "system": levels(trainer.lm, trainer.optimizer).to_dict(),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "tokens_per_second": tokens / sum(step_seconds) if step_seconds else None,
        "step_seconds": {"median": _median(step_seconds), "measured": len(step_seconds)},
        "peak_memory": memory,
        "validation": {
            "blocks": len(trainer.eval_dataset),  # type: ignore[arg-type]
            "before": _score(validation[0], bundle),
            "after": _score(validation[-1], bundle),
        },
        "positions": scores,
        "losses": {"train": train, "validation": validation},
        "sample": _sample(model, bundle, config.sample_tokens, config.seed),
        "minutes": None if trainer.clock is None else trainer.clock.seconds / 60,
        "files": _files(folder, scores is not None, config.memory_tokens > 0),
    }
    write_json(folder.result, result)
    return result


def _files(folder: RunFolder, scored: bool, watched: bool) -> dict[str, str | None]:
    """Paths of all files by name; None for what the run does not have."""
    names = dict.fromkeys(("model", "result", "plot", "tensorboard"), True)
    names |= {"positions": scored, "memories": watched}
    return {name: str(getattr(folder, name)) if there else None for name, there in names.items()}


def _plot(trainer: HopeTrainer, folder: RunFolder, scores: dict[str, Any] | None) -> tuple[Curve, Curve]:
    """Write the plots; the curves of training and validation."""
    train, validation = _curve(trainer, "loss"), _curve(trainer, "eval_loss")
    title = f"{trainer.config.preset} on {trainer.config.data.source}"
    plot_losses(folder.plot, train, validation, title)
    if scores is not None:
        plot_positions(folder.positions, curves(scores), title)
    return train, validation


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _curve(trainer: HopeTrainer, key: str) -> Curve:
    return [(int(entry["step"]), entry[key]) for entry in trainer.state.log_history if key in entry]


def _score(point: tuple[float, float], bundle: DataBundle) -> dict[str, float]:
    step, nats = point
    bits = bits_per_byte(nats, bundle.bytes_per_token)
    return {"step": step, "nats_per_token": nats, "bits_per_byte": bits}


def _samples_read(trainer: HopeTrainer, bundle: DataBundle) -> dict[str, Any]:
    """Samples of all steps, and the epochs that they make where the text has a length."""
    samples = trainer.state.global_step * trainer.config.batch_size
    blocks = getattr(bundle.train, "blocks_per_epoch", None)
    return {"train_samples": samples} | ({} if blocks is None else {"epochs": samples / blocks})


def sample_seconds(model: PreTrainedModel, bundle: DataBundle, length: int) -> float:
    """About the seconds that a sample of `length` tokens will take; random numbers stay as they were."""
    tried = min(length, TRIED_TOKENS)
    if tried == 0:
        return 0.0
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        start = time.perf_counter()
        _sample(model, bundle, tried, 0)
        return (time.perf_counter() - start) * length / tried


def _sample(model: PreTrainedModel, bundle: DataBundle, length: int, seed: int) -> dict[str, str] | None:
    """Text sampled from the trained model after the first tokens of the validation text."""
    if length == 0:
        return None
    prompt = bundle.validation[0]["input_ids"][None, :PROMPT_TOKENS].to(model.device)
    set_seed(seed)
    model.eval()
    ids = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=True,
        temperature=0.8,
        pad_token_id=bundle.tokenizer.pad_token_id,
    )[0]
    tokenizer = bundle.tokenizer
    return {
        "prompt": str(tokenizer.decode(prompt[0])),
        "text": str(tokenizer.decode(ids[prompt.shape[1] :])),
    }
