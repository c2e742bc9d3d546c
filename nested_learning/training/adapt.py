"""Continued pre-training of a pretrained model with its levels active; see `continual.adaptation`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedModel, PrinterCallback

from nested_learning._files import whole_folder
from nested_learning._progress import progress
from nested_learning._saved_models import load_causal_lm
from nested_learning.continual import Learner, Level, stack_levels
from nested_learning.continual.adaptation import Adapter
from nested_learning.continual.files import fingerprint
from nested_learning.continual.objectives.anchor_files import AnchorFiles
from nested_learning.levels import levels as system
from nested_learning.training.adapt_config import AdaptConfig
from nested_learning.training.callbacks import StepCounter, StepTimer, StopOnSignal, StopRequest
from nested_learning.training.checkpoints import checkpoint_to_resume
from nested_learning.training.config import OptimConfig
from nested_learning.training.config_file import read_yaml, to_dict
from nested_learning.training.data import DataBundle, DataConfig, build_data
from nested_learning.training.models import saved_folder
from nested_learning.training.optim import rehearse
from nested_learning.training.process import process_state
from nested_learning.training.report import hardware, plot_losses, versions
from nested_learning.training.run import Outcome, TrainingDiverged
from nested_learning.training.run_folder import RunFolder, write_json
from nested_learning.training.trainer import HopeTrainer, NonFiniteError, trainer_arguments

STARTS_FILE = "starts.safetensors"  # in the folder of the trained model


class AdaptTrainer(HopeTrainer):
    """Training and evaluation on texts that are read with levels learning as they go."""

    def __init__(self, learner: Learner, *args: Any) -> None:
        super().__init__(learner.model, *args)
        self.adapter = Adapter(learner)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self.adapter.backward(self._prepare_inputs(inputs)["input_ids"])
        self._require_finite("loss of", loss)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.adapter.loss(self._prepare_inputs(inputs)["input_ids"]), None, None


def adapt(
    config: AdaptConfig,
    levels: Sequence[Level],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Train the base model while its levels learn, and write it to `config.output`.

    The model in `model/` is of the original class; stack the same levels on it to use it. Where they begin at
    learned starts, `model/starts.safetensors` has these for the trained model: starts belong to one base.

    Args:
        config: the run.
        levels: fast to slow.
        resume: go on with the run in the folder; `saved_run` gives its `config` and `levels`.
        overwrite: replace the run in the folder.

    Raises:
        ValueError: a setting, the model, the text or the folder does not fit; several processes; there are
            checkpoints to resume from, and none is whole.
        OSError: the folder cannot be written.
        TrainingDiverged: a loss was NaN or infinite.
    """
    if process_state().num_processes > 1:
        raise ValueError(
            f"adapt runs in one process, got {process_state().num_processes}: each text is a sequence of "
            "passes of its own, which processes cannot share yet"
        )
    _check_length(config.data.block_size, levels)
    folder = RunFolder(config.output)
    folder.check(resume=resume, overwrite=overwrite)
    checkpoint = checkpoint_to_resume(folder.checkpoints, process_state()) if resume else None
    files = AnchorFiles(config.background, config.fisher)
    source = saved_folder(config.model)
    described = AutoConfig.from_pretrained(source, local_files_only=True)
    rehearse(described, config.optim, config.data.block_size, config.steps)
    data = dataclasses.replace(config.data, tokenizer=str(source), seed=config.data.seed + config.seed)
    bundle = build_data(data, config.steps * config.batch_size)
    set_seed(config.seed)
    model = load_causal_lm(source, described, local_files_only=True, dtype=torch.float32)
    model.to(process_state().device)
    learner = stack_levels(
        model,
        bundle.tokenizer,
        levels=levels,
        gradient_checkpointing=config.gradient_checkpointing,
        starts=config.starts,
        **files.of(model, bundle.tokenizer, levels),
    )
    anchors = learner.reader.anchors.identity()
    if not resume:
        own = [level.describe() for level in learner.levels]
        saved = {"config": to_dict(config), "levels": own, **({"anchors": anchors} if anchors else {})}
        folder.start(yaml.safe_dump(saved, sort_keys=False))
    else:
        _check_anchors(folder, anchors)
    return _run(config, folder, learner, bundle, checkpoint)


def _check_length(block_size: int, levels: Sequence[Level]) -> None:
    """Raise ValueError where no text reaches beyond a chunk: what levels learn would never be read with."""
    fastest = min(level.chunk_size for level in levels)
    if block_size <= fastest:
        raise ValueError(
            f"block_size is {block_size}, so no text is longer than the fastest chunk of {fastest}, and no "
            "level would change a loss: give longer texts, or smaller --chunk_sizes"
        )


def _check_anchors(folder: RunFolder, now: dict[str, str]) -> None:
    """Raise ValueError if files of anchors are not those that a run began with; `now` has their digests."""
    begun = read_yaml(folder.config).get("anchors", {})
    changed = sorted(name for name in now.keys() | begun.keys() if now.get(name) != begun.get(name))
    if changed:
        raise ValueError(
            f"the run began with another {' and '.join(changed)} than the file has now; bring that file "
            "back, or begin a new run"
        )


def saved_run(output: str) -> tuple[AdaptConfig, list[Level]]:
    """The configuration and the levels of the run in a folder.

    Raises:
        ValueError: it holds no run of `adapt`.
    """
    folder = RunFolder(output)
    folder.check(resume=True, overwrite=False)
    saved = read_yaml(folder.config)
    if set(saved) - {"anchors"} != {"config", "levels"}:
        raise ValueError(f"{output} holds another kind of run; resume it with the command that began it")
    try:
        values = saved["config"]
        data, optim = DataConfig(**values.pop("data")), values.pop("optim")
        optim["betas"] = tuple(optim["betas"])
        config = AdaptConfig(**{**values, "data": data, "optim": OptimConfig(**optim), "output": output})
        return config, [Level(**level) for level in saved["levels"]]
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder.config} is damaged: {error}; start the run anew with --overwrite"
        ) from error


def _run(
    config: AdaptConfig,
    folder: RunFolder,
    learner: Learner,
    bundle: DataBundle,
    checkpoint: Path | None,
) -> Outcome:
    training = config.as_training()
    use_cache = learner.model.config.use_cache  # the Trainer turns it off
    args = trainer_arguments(training, folder, 1)  # texts are read one by one
    args.eval_on_start = checkpoint is None
    trainer = AdaptTrainer(learner, training, bundle.tokenizer, args, bundle.train, bundle.validation)
    timer, request = StepTimer(), StopRequest()
    stop = StopOnSignal(request, lambda number: number)
    trainer.remove_callback(PrinterCallback)
    for callback in (stop, timer):
        trainer.add_callback(callback)
    try:
        with request.listening(), progress("training", unit="step") as bar:
            trainer.add_callback(StepCounter(bar))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        raise TrainingDiverged(
            f"{error}. The last state with finite values is kept in {trainer.save_now()}. "
            "Try a lower --lr or --level_lr in a new run."
        ) from error
    learner.model.config.use_cache = use_cache
    result = None
    if not stop.stopped_by:
        with progress("writing the results"):
            result = _write_results(config, learner, trainer, folder, bundle, timer)
    return Outcome(folder, result, stop.stopped_by, folder.last_checkpoint())


def _write_results(
    config: AdaptConfig,
    learner: Learner,
    trainer: AdaptTrainer,
    folder: RunFolder,
    bundle: DataBundle,
    timer: StepTimer,
) -> dict[str, Any]:
    """Write `model/`, `loss.png` and, last, `result.json`."""
    model = learner.model
    if trainer.state.global_step % (config.as_training().eval_every or 1):  # the last step was not evaluated
        trainer.evaluate()
    with whole_folder(folder.model, folder.standing()) as target:
        model.save_pretrained(target)
        if (starts := learner.memory.starts) is not None:
            dataclasses.replace(starts, fingerprint=fingerprint(model)).save(target / STARTS_FILE)
        bundle.tokenizer.save_pretrained(target)
    curves = {
        key: [(int(entry["step"]), entry[key]) for entry in trainer.state.log_history if key in entry]
        for key in ("loss", "eval_loss")
    }
    plot_losses(folder.plot, curves["loss"], curves["eval_loss"], f"{Path(config.model).name} with levels")
    tokens = config.batch_size * config.data.block_size * len(timer.seconds)
    result = {
        "format": "nested_learning.adaptation",
        "version": 1,
        "config": to_dict(config),
        "levels": [level.describe() for level in learner.levels],
        "system": system(learner, trainer.optimizer).to_dict(),
        "versions": versions(),
        "hardware": hardware(trainer.args.device, 1),
        "data": bundle.summary,
        "steps": trainer.state.global_step,
        "tokens_per_second": tokens / sum(timer.seconds) if timer.seconds else None,
        "validation": {
            "with_levels_before": curves["eval_loss"][0][1],
            "with_levels_after": curves["eval_loss"][-1][1],
            "without_levels_after": _plain_loss(model, bundle.validation),
        },
        "losses": {"train": curves["loss"], "validation": curves["eval_loss"]},
        "files": {"model": str(folder.model), "result": str(folder.result), "plot": str(folder.plot)},
    }
    write_json(folder.result, result)
    return result


@torch.no_grad()
def _plain_loss(model: PreTrainedModel, validation: Dataset[dict[str, Tensor]]) -> float:
    """Mean next-token loss of the model alone, each text read in one pass."""
    model.eval()
    losses = []
    for i in range(len(validation)):  # type: ignore[arg-type]
        ids = validation[i]["input_ids"][None].to(model.device)
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return math.fsum(losses) / len(losses)
