"""The transformers Trainer with this project's optimizer, schedule, order of data and failure rules."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import EvalLoopOutput

from nested_learning._files import last_written, put_folder, write_failure
from nested_learning._precision import warn_of_slow_bfloat16
from nested_learning.optimizers.sharded import whole
from nested_learning.training.carried import carried_rows
from nested_learning.training.checkpoints import STATE, has_manifest, rotate, standing, write_manifest
from nested_learning.training.config import TrainConfig
from nested_learning.training.data.streams import DocumentBlocks
from nested_learning.training.optim import build_optimizer, build_schedule
from nested_learning.training.positions import loss_by_position
from nested_learning.training.process import process_state, settle_shards, shard_as_one
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.timing import ClockSchedule, RunClock

# Tensors of torch's optimizers that have the shape of their parameter.
PER_ELEMENT = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "accumulated"),
    }
)


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the step that it belongs to was not taken."""

    def __init__(self, quantity: str, value: float, step: int) -> None:
        super().__init__(f"the {quantity} step {step} is {value}")
        self.step = step


def split_batch(config: TrainConfig, num_processes: int) -> tuple[int, int]:
    """(sequences per process and forward pass, accumulation steps) that make up the global batch.

    Raises:
        ValueError: the processes or the micro-batches do not divide the batch.
    """
    if config.batch_size % num_processes:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by the {num_processes} processes of this run. "
            "It counts the sequences of one optimizer step over all processes: choose a multiple."
        )
    per_process = config.batch_size // num_processes
    micro = config.micro_batch_size or per_process
    if per_process % micro:
        raise ValueError(
            f"micro_batch_size {micro} does not divide the {per_process} sequences that each of "
            f"{num_processes} process(es) gets of a batch of {config.batch_size}. Choose a divisor."
        )
    return micro, per_process // micro


def trainer_arguments(config: TrainConfig, folder: RunFolder, eval_batch: int) -> TrainingArguments:
    """TrainingArguments of a run whose number of steps is fixed, or bounded where time ends it.

    Args:
        config: the run, after `TrainConfig.with_steps`.
        folder: where its checkpoints go.
        eval_batch: validation sequences per forward pass, over all processes.
    """
    assert config.steps is not None
    if config.precision == "bf16":
        warn_of_slow_bfloat16(process_state().device, "leave precision at fp32")
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=config.steps,
        max_grad_norm=config.optim.whole_norm,
        use_cpu=process_state().device.type == "cpu",  # said outright, or bf16 is refused there
        bf16=config.precision == "bf16",
        activation_checkpointing=config.gradient_checkpointing,
        train_sampling_strategy="sequential",  # the dataset is in the order to be trained on
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the trainer stops at the first such loss
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_every or config.steps,
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        disable_tqdm=True,  # `train` adds its own bar
        ddp_find_unused_parameters=False,  # every parameter takes part in every step
        report_to="none",  # a callback of `train` writes for TensorBoard, into the folder of the run
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs of one process would multiply the batch: use torchrun
    args.per_device_train_batch_size, args.gradient_accumulation_steps = split_batch(config, args.world_size)
    args.per_device_eval_batch_size = max(1, eval_batch // args.world_size)
    return args


class HopeTrainer(Trainer):
    """Trainer of causal language models on packed blocks; see `train` for a whole run.

    On a `CarriedDataset` rows carry their states from block to block, and `DocumentBlocks` are evaluated so.

    A step whose loss or gradient norm is not finite raises NonFiniteError before the parameters change.
    Checkpoints appear under their name only when they are complete, with a manifest of sizes and sums of
    their files; see `checkpoints`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
    ) -> None:
        # The tokenizer is not given to the Trainer as its processing class: that would copy its special
        # tokens, the end of text among them, into the model's configuration.
        super().__init__(model, args, default_data_collator, train_dataset, eval_dataset)
        if getattr(model.config, "cms_update", "none") == "lm":
            shard_as_one(self.accelerator)
        self.lm = model
        self.config = config
        self.tokenizer = tokenizer
        self.checkpoints = Path(str(args.output_dir))
        self._save_to: str | None = None
        self.clock: RunClock | None = None  # of a run with `max_minutes`
        self.carried = carried_rows(model, train_dataset)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        settle_shards(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def autocast_smart_context_manager(self, *arguments: Any, **named: Any) -> AbstractContextManager[Any]:
        if self.is_fsdp_enabled:  # accelerate puts autocast around the forward pass of all but shards
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*arguments, **named)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.lm, self.config.optim, self.config.data.block_size)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            if self.clock is None:
                self.lr_scheduler = build_schedule(optimizer, self.config.optim, num_training_steps)
            else:
                self.lr_scheduler = ClockSchedule(optimizer, self.clock)  # type: ignore[assignment]
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[return-value]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        if self.carried is not None:
            inputs = self.carried.enter(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.carried is not None:
            self.carried.leave()
        # The mean over processes, so that all of them stop, or none.
        self._require_finite("loss", self.accelerator.reduce(loss, "mean"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = whole(torch.as_tensor(norm))
        self._require_finite("gradient norm", norm)
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise NonFiniteError("validation loss after", loss, self.state.global_step)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        data, model = self.eval_dataset, cast(PreTrainedModel, self.model)
        if not isinstance(data, DocumentBlocks):
            return super().evaluation_loop(*args, **kwargs)
        rows = self.args.eval_batch_size * self.args.world_size
        score = loss_by_position(model, data.documents, data.block_size, True, rows, self.accelerator)
        metrics = {f"{kwargs.get('metric_key_prefix', 'eval')}_loss": score["nats_per_token"]}
        return EvalLoopOutput(None, None, metrics, len(data))  # type: ignore[arg-type]

    def _require_finite(self, quantity: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise NonFiniteError(f"{quantity} of", float(value), self.state.global_step + 1)

    def save_now(self) -> Path:
        """Write a checkpoint of the last completed step and return its folder."""
        self._save_checkpoint(self.lm, trial=None)
        return self.checkpoints / f"checkpoint-{self.state.global_step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _check_pieces(resume_from_checkpoint, self.is_fsdp_enabled)
        with _damage_named(resume_from_checkpoint):
            TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint has all parameters but those that share another's memory, and no others."""
        missing = set(load_result.missing_keys) - set(self.lm.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(load_result.unexpected_keys)}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                _check_optimizer(self.optimizer, self.lr_scheduler, checkpoint)
        if checkpoint is not None and self.carried is not None:
            size, index, processes = (
                self.args.per_device_train_batch_size,
                self.args.process_index,
                self.args.world_size,
            )
            first_rows = [
                (turn * processes + index) * size for turn in range(self.args.gradient_accumulation_steps)
            ]
            self.carried.load(Path(checkpoint), first_rows, size, self.args.device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            super()._load_rng_state(checkpoint)
        index = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        if checkpoint is not None and not (Path(checkpoint) / f"rng_state{index}.pth").is_file():
            warnings.warn(
                f"{checkpoint} was written by another number of processes than the {self.args.world_size} of "
                "now: random numbers, those of dropout for one, are not those of a run without interruption",
                RuntimeWarning,
                stacklevel=2,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._save_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint as the Trainer does, into a hidden folder that is renamed at the end.

        Raises:
            OSError: it cannot be written. Where the disk is full the message names the file and the last
                checkpoint, which stands.
        """
        partial = self.checkpoints / ".partial"
        new = partial / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._save_to = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            if self.carried is not None:
                self.carried.save(new, self.state.global_step)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(new)
            self.accelerator.wait_for_everyone()
        except Exception as error:  # torch and safetensors each have their own for a full disk
            file = self.checkpoints / new.name / last_written(new)
            failure = write_failure(error, file, standing(self.checkpoints))
            if failure is None:
                raise
            raise failure from error
        finally:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self._save_to = None

    def _finish_checkpoint(self, new: Path) -> None:
        """Add what the Trainer does not write, the manifest last, and give the folder its place."""
        final = self.checkpoints / new.name
        self.tokenizer.save_pretrained(new)
        best = self.checkpoints / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)  # the Trainer looks for it in the hidden folder
            self.state.save_to_json(str(new / STATE))
        write_manifest(new)
        put_folder(new, final)
        rotate(self.checkpoints, self.args.save_total_limit, final, self.state.best_model_checkpoint)


def _check_optimizer(optimizer: Any, schedule: Any, checkpoint: str) -> None:
    """ValueError where what was loaded cannot be the state of this optimizer after the checkpoint's steps.

    torch itself takes any state for any parameter.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    step = int(Path(checkpoint).name.rpartition("-")[2])
    if schedule.last_epoch != step:
        raise ValueError(f"its schedule is at step {schedule.last_epoch}, the checkpoint at {step}")
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    states = [optimizer.state.get(p, {}) for p in params]
    known = has_manifest(Path(checkpoint))  # then the file is what was written, also where it lacks some
    if not known and not all(states) and (any(states) or isinstance(optimizer, torch.optim.AdamW)):
        lacking = sum(not state for state in states)
        raise ValueError(f"its optimizer has no state of {lacking} of {len(states)} parameters")
    for p, state in zip(params, states, strict=True):
        for name, value in state.items():
            if name in PER_ELEMENT and tuple(value.shape) != tuple(p.shape):
                raise ValueError(
                    f"its optimizer's {name} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
                )


def _check_pieces(checkpoint: str, sharded: bool) -> None:
    """ValueError for a checkpoint of shards in a run without them, and the other way round."""
    if any(Path(checkpoint).glob("pytorch_model_fsdp*")) == sharded:
        return
    pieces = ("in shards", "of a model in one piece")
    way = "without FSDP" if sharded else "in 2 processes or more by accelerate launch with FSDP"
    raise ValueError(
        f"the checkpoint {checkpoint} is {pieces[sharded]}, that of this run must be {pieces[not sharded]}: "
        f"resume it {way}, as it was begun."
    )


@contextmanager
def _damage_named(checkpoint: str | None) -> Iterator[None]:
    """Turn any error of loading a damaged file into a ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # safetensors, torch and zipfile each have their own
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged or of another model ({type(error).__name__}: {error}). "
            "Remove that folder to resume from the one before it."
        ) from error
