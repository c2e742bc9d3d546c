"""A whole training run: data, model, training, and the results in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from nested_learning._checks import LARGEST
from nested_learning._progress import progress
from nested_learning.levels import levels
from nested_learning.models import preset
from nested_learning.training.callbacks import StepCounter, StepTimer, StopOnSignal, StopRequest
from nested_learning.training.carried import check_carries
from nested_learning.training.checkpoints import STATE, checkpoint_to_resume
from nested_learning.training.compiling import compile_blocks
from nested_learning.training.config import DEFAULT_STEPS, TrainConfig
from nested_learning.training.config_file import dump_config, load_config, refuse_changes, to_dict
from nested_learning.training.data import DataBundle, DocumentBlocks, build_data
from nested_learning.training.memories import RecordMemories, check_memories, text_of
from nested_learning.training.models import model_config, new_model
from nested_learning.training.optim import rehearse
from nested_learning.training.positions import score_both_ways
from nested_learning.training.process import process_state
from nested_learning.training.results import sample_seconds, write_results
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.timing import MOST_STEPS, RunClock
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


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Train a model and write it, its checkpoints, `result.json` and `loss.png` to `config.output`.

    Works alike in one process and in several (`torchrun`, `accelerate launch`): `batch_size` counts all.

    Args:
        config: the run.
        resume: go on with the run in the folder. `config` must be the one it was started with.
        overwrite: replace the run in the folder.

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
    clock = [] if config.max_minutes is None else [RunClock(config)]
    if not clock:
        config = config.with_steps(config.steps or DEFAULT_STEPS)
        assert config.steps is not None
        config.optim.warmup(config.steps)  # refuses a warm-up that would fill the run
    split_batch(config, process.num_processes)  # before the text is read: refuse a batch that does not fit
    described = preset(config.preset, **config.model)
    rehearse(described, config.optim, config.data.block_size, config.steps)  # or a model
    bundle = seeded_data(_bounded(config, checkpoint))
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), config.seed)
    if config.data.carry_state:
        check_carries(model)
    if config.memory_tokens:
        check_memories(model)
        text_of(bundle.validation, config.memory_tokens)
    model.to(process.device)
    if config.compile:
        compile_blocks(model)
    if process.is_main_process:
        folder.check_space(_bytes_to_write(model, config))
        if not resume:
            folder.start(dump_config(config))
    process.wait_for_everyone()
    return _run(config, folder, model, bundle, checkpoint, clock)


def seeded_data(config: TrainConfig) -> DataBundle:
    """The data of a run of fixed length; their order depends on `data.seed` + `seed`."""
    assert config.steps is not None
    data = dataclasses.replace(config.data, seed=config.data.seed + config.seed)
    return build_data(data, config.steps * config.batch_size, config.batch_size)


def _resumed_config(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """The run's own configuration, after checking that the given one is the same."""
    saved = folder.saved_config()
    fixed = saved.steps is not None and config.steps in (None, saved.steps)
    given = config.with_steps(saved.steps) if fixed and saved.steps else config
    if saved.data.documents != load_config(folder.config).data.documents:
        # Begun before documents could be marked: the default of today says nothing about the run.
        given = dataclasses.replace(
            given, data=dataclasses.replace(given.data, documents=saved.data.documents)
        )
    refuse_changes(saved, to_dict(given))
    return dataclasses.replace(saved, output=config.output)


def _bounded(config: TrainConfig, checkpoint: Path | None) -> TrainConfig:
    """The run with a number of steps that it does not exceed."""
    if config.steps is not None:
        return config
    steps = min(MOST_STEPS, LARGEST // config.batch_size)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.max_steps == state.global_step:  # its time was up; only its results were not written
            steps = state.global_step
    return config.with_steps(steps)


def _bytes_to_write(model: PreTrainedModel, config: TrainConfig) -> int:
    """Disk space for the checkpoints (weights and the optimizer's state) and the final model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    system = levels(*rehearse(model.config, config.optim, config.data.block_size))
    memories = [each.state_bytes for each in system.components if each.kind == "optimizer"]
    # an optimizer without a description is taken for one with two moments, as AdamW
    state = 2 * weights if None in memories else sum(each for each in memories if each is not None)
    return (weights + state) * (config.keep_checkpoints + 1) + weights


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
    callbacks: Sequence[TrainerCallback],
) -> Outcome:
    validation, eval_batch = _whole_batches(bundle.validation, config.batch_size)
    if bundle.carried:
        eval_batch = config.batch_size
        validation = DocumentBlocks(bundle.carried, config.data.block_size, eval_batch)
    args = trainer_arguments(_bounded(config, checkpoint), folder, eval_batch)
    args.eval_on_start = checkpoint is None
    trainer = HopeTrainer(model, config, bundle.tokenizer, args, bundle.train, validation)
    trainer.clock = next((callback for callback in callbacks if isinstance(callback, RunClock)), None)
    if trainer.clock is not None and trainer.is_world_process_zero():
        trainer.clock.took("sample", sample_seconds(model, bundle, config.sample_tokens))
    timer, request = StepTimer(), StopRequest()
    stop = StopOnSignal(request, _agreement(trainer))
    _set_callbacks(trainer, folder, bundle, *callbacks, stop, timer)
    try:
        with request.listening(), progress("training", unit="step") as bar:
            trainer.add_callback(StepCounter(bar))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        kept = trainer.save_now()
        raise TrainingDiverged(
            f"{error}. The last state with finite values is kept in {kept}. Try a lower --lr, a longer "
            "--optim.warmup_steps or --precision fp32 in a new run."
        ) from error
    result = None
    if stop.stopped_by is None:
        with progress("writing the results"):
            scores = _score(trainer, bundle)
            result = write_results(trainer, folder, bundle, timer.seconds, scores)
    trainer.accelerator.wait_for_everyone()
    return Outcome(folder, result, stop.stopped_by, folder.last_checkpoint())


def _score(trainer: HopeTrainer, bundle: DataBundle) -> dict[str, Any] | None:
    """Loss by position of the trained model on whole documents; None where it is not asked for."""
    if not bundle.scored:
        return None
    config, model = trainer.config, cast(PreTrainedModel, trainer.model)
    return score_both_ways(
        model, bundle.scored, config.data.block_size, config.batch_size, trainer.accelerator
    )


def _set_callbacks(
    trainer: HopeTrainer, folder: RunFolder, bundle: DataBundle, *callbacks: TrainerCallback
) -> None:
    """The given callbacks in place of the Trainer's own printing, TensorBoard and the record of memories."""
    trainer.remove_callback(PrinterCallback)
    writes, count = trainer.is_world_process_zero(), trainer.config.memory_tokens
    board = SummaryWriter(str(folder.tensorboard)) if writes else None
    if board is not None and count:  # before those that take the time of an evaluation
        ids = text_of(bundle.validation, count)
        trainer.add_callback(RecordMemories(trainer.lm, ids, folder, board.add_scalar))
    for callback in callbacks:
        trainer.add_callback(callback)
    if board is not None:
        trainer.add_callback(TensorBoardCallback(board))


def _agreement(trainer: HopeTrainer) -> Callable[[int], int]:
    """A function that gives the largest of the numbers that the processes call it with."""

    def agree(number: int) -> int:
        if trainer.args.world_size == 1:
            return number
        return int(trainer.accelerator.gather(torch.tensor([number], device=trainer.args.device)).max())

    return agree
