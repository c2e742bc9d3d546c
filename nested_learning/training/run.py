"""A whole training run: data, model, training, and the results in its folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from nested_learning.models import preset
from nested_learning.training import timing
from nested_learning.training.callbacks import Progress, StepTimer, StopOnSignal, StopRequest
from nested_learning.training.checkpoints import checkpoint_to_resume
from nested_learning.training.config import DEFAULT_EVALS, DEFAULT_STEPS, TrainConfig
from nested_learning.training.config_file import dump_config, load_config, refuse_changes, to_dict
from nested_learning.training.data import DataBundle, build_data
from nested_learning.training.models import model_config, new_model
from nested_learning.training.process import process_state
from nested_learning.training.results import write_results
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.trainer import HopeTrainer, NonFiniteError, split_batch, trainer_arguments


class TrainingDiverged(RuntimeError):
    """Training stopped at a step whose loss or gradient is NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run: complete, or interrupted.

    Args:
        folder: the run's folder.
        result: the contents of result.json, or None if the run was interrupted.
        signal: the number of the signal that interrupted it, or None.
        checkpoint: the last checkpoint.
    """

    folder: RunFolder
    result: dict[str, Any] | None
    signal: int | None
    checkpoint: Path | None


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = False
) -> Outcome:
    """Train a model and write it, its checkpoints, `result.json` and `loss.png` to `config.output`.

    Works alike in one process and in several (`torchrun`, `accelerate launch`): `batch_size` counts all.

    Args:
        config: the run.
        resume: go on with the run in the folder. `config` must be the one it was started with.
        overwrite: replace the run in the folder.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a setting, the text or the folder does not fit, or there are checkpoints to resume from
            and none is whole; nothing was written.
        OSError: the folder cannot be written.
        TrainingDiverged: a loss was NaN or infinite. The state before that step is the last checkpoint.
    """
    process = process_state()
    folder = RunFolder(config.output)
    if process.is_main_process:
        folder.check(resume=resume, overwrite=overwrite)
    process.wait_for_everyone()
    checkpoint = None
    if resume:
        config = _resumed_config(config, folder)
        checkpoint = checkpoint_to_resume(folder.checkpoints, process)
    model, bundle, config = _prepare(config, process)
    assert config.steps is not None
    config.optim.warmup(config.steps)  # refuses a warm-up that would fill the run
    if process.is_main_process:
        folder.check_space(_bytes_to_write(model, config))
        if not resume:
            folder.start(dump_config(config))
    process.wait_for_everyone()
    return _run(config, folder, model, bundle, checkpoint, progress)


def seeded_data(config: TrainConfig) -> DataBundle:
    """The data of a run of fixed length; their order depends on `data.seed` + `seed`."""
    assert config.steps is not None
    data = dataclasses.replace(config.data, seed=config.data.seed + config.seed)
    return build_data(data, config.steps * config.batch_size)


def _resumed_config(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """The run's own configuration, after checking that the given one is the same."""
    saved = folder.saved_config()
    assert saved.steps is not None
    given = config.with_steps(saved.steps) if config.steps in (None, saved.steps) else config
    if saved.data.documents != load_config(folder.config).data.documents:
        # Begun before documents could be marked: the default of today says nothing about the run.
        given = dataclasses.replace(
            given, data=dataclasses.replace(given.data, documents=saved.data.documents)
        )
    refuse_changes(saved, to_dict(given))
    return dataclasses.replace(saved, output=config.output)


def _prepare(config: TrainConfig, process: PartialState) -> tuple[PreTrainedModel, DataBundle, TrainConfig]:
    """Model on its device, data, and the configuration with the number of steps fixed."""
    # Before the text is read: refuse a batch or a model that does not fit.
    split_batch(config, process.num_processes)
    preset(config.preset, **config.model)
    if config.max_minutes is None:
        config = config.with_steps(config.steps or DEFAULT_STEPS)
        bundle = seeded_data(config)
        return _model(config, bundle, process), bundle, config
    bundle = seeded_data(config.with_steps(1))  # for the tokenizer and the size of an evaluation
    model = _model(config, bundle, process)
    [steps] = broadcast_object_list([_fitting_steps(config, model, bundle, process.num_processes)])
    config = config.with_steps(steps)  # the number that process 0 found: all must run equally many
    return model, seeded_data(config), config


def _model(config: TrainConfig, bundle: DataBundle, process: PartialState) -> PreTrainedModel:
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), config.seed)
    return model.to(process.device)


def _fitting_steps(config: TrainConfig, model: PreTrainedModel, bundle: DataBundle, processes: int) -> int:
    assert config.max_minutes is not None
    micro, accumulation = split_batch(config, processes)
    step, forward = timing.measure(model, config, micro, timing.MEASURED * 60 * config.max_minutes)
    evaluation = forward * math.ceil(len(bundle.validation) / (micro * processes))
    return timing.steps_within(
        config.max_minutes, step * accumulation, evaluation, config.eval_every, DEFAULT_EVALS
    )


def _bytes_to_write(model: PreTrainedModel, config: TrainConfig) -> int:
    """Disk space for the checkpoints (weights and AdamW's two moments) and the final model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights * (3 * (config.keep_checkpoints + 1) + 1)


def _whole_batches(validation: Dataset, batch_size: int) -> tuple[Dataset, int]:
    """(the validation samples in a whole number of batches, samples per batch).

    The Trainer averages over batches as if all were full; with whole ones that is the mean over samples.
    """
    available = len(validation)  # type: ignore[arg-type]
    batch = min(batch_size, available)
    kept = available // batch * batch
    return Subset(validation, [i * available // kept for i in range(kept)]), batch


def _run(
    config: TrainConfig,
    folder: RunFolder,
    model: PreTrainedModel,
    bundle: DataBundle,
    checkpoint: Path | None,
    progress: bool,
) -> Outcome:
    validation, eval_batch = _whole_batches(bundle.validation, config.batch_size)
    args = trainer_arguments(config, folder, eval_batch)
    args.eval_on_start = checkpoint is None
    trainer = HopeTrainer(model, config, bundle.tokenizer, args, bundle.train, validation)
    timer, request = StepTimer(), StopRequest()
    stop = StopOnSignal(request, _agreement(trainer))
    _set_callbacks(trainer, folder, stop, timer, *([Progress()] if progress else []))
    disable_progress_bar()  # one of transformers' own per file written
    try:
        with request.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        kept = trainer.save_now()
        raise TrainingDiverged(
            f"{error}. The last state with finite values is kept in {kept}. Try a lower --lr, a longer "
            "--optim.warmup_steps or --precision fp32 in a new run."
        ) from error
    result = None
    if stop.stopped_by is None:
        result = write_results(trainer, folder, bundle, timer.seconds)
    trainer.accelerator.wait_for_everyone()
    return Outcome(folder, result, stop.stopped_by, folder.last_checkpoint())


def _set_callbacks(trainer: HopeTrainer, folder: RunFolder, *callbacks: TrainerCallback) -> None:
    """The given callbacks in place of the Trainer's own printing, and TensorBoard in the run's folder."""
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder.tensorboard))))


def _agreement(trainer: HopeTrainer) -> Callable[[int], int]:
    """A function that gives the largest of the numbers that the processes call it with."""

    def agree(number: int) -> int:
        if trainer.args.world_size == 1:
            return number
        return int(trainer.accelerator.gather(torch.tensor([number], device=trainer.args.device)).max())

    return agree
