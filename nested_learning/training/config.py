"""The one configuration of a training run: flags, a YAML file and Python all fill it in.

`TrainConfig` is the root; `data` and `optim` are nested. On the command line every field is a dotted
flag (`--optim.lr 1e-2`, `--model.num_hidden_layers 2`), in YAML a nested key.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nested_learning._checks import LARGEST, check_types, require, require_folder_name, require_seed
from nested_learning.training.data.config import DataConfig

DEFAULT_STEPS = 1000
DEFAULT_EVALS = 5  # evaluations of a run after the one before training
DEFAULT_SAVES = 4  # checkpoints of a run
DEFAULT_WARMUP = 50  # steps, at most a quarter of the run


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, or one per level, and the learning-rate schedule.

    Args:
        lr: peak learning rate
        name: optimizer: a class of torch.optim or nested_learning.optimizers, in any case
        levels: parts of the model that are trained in a way of their own, a JSON list of objects:
            `part` (cms.0, initial, gates, ...; `nested-learning levels MODEL` shows them), and what differs
            of name, lr, weight_decay, period (steps from one update to the next, or "chunk"), reduction (sum
            or mean) and options of the optimizer
        options: other options of the optimizer, a JSON object
        betas: decay rates of the first and second moment of AdamW, also beside an optimizer for matrices
        eps: epsilon of the same
        weight_decay: decoupled weight decay of matrices; biases, norms, gates, embeddings and the initial
            states of memories get none
        warmup_steps: optimizer steps of linear warm-up; default: 50, but at most a quarter of all steps. In a
            run with `max_minutes` it ends by half of the time at the latest
        schedule: shape of the decay after warm-up
        final_lr_fraction: learning rate of the last step as a fraction of the peak
        max_grad_norm: the gradient's global norm is clipped to this, with `levels` that of each level; 0
            turns clipping off
    """

    lr: float = 3e-3
    name: str = "adamw"
    levels: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    final_lr_fraction: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "a positive number such as 3e-3")
        for beta in self.betas:
            require(0 <= beta < 1, "optim.betas", self.betas, "two numbers in [0, 1) such as [0.9, 0.95]")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number such as 1e-8")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or a positive number")
        require(
            self.schedule in ("cosine", "linear"), "optim.schedule", self.schedule, "'cosine' or 'linear'"
        )
        require(
            0 <= self.final_lr_fraction <= 1,
            "optim.final_lr_fraction",
            self.final_lr_fraction,
            "a fraction in [0, 1]",
        )
        require(self.max_grad_norm >= 0, "optim.max_grad_norm", self.max_grad_norm, "0 or a positive number")
        if self.warmup_steps is not None:
            require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more steps")

    @property
    def whole_norm(self) -> float:
        """Norm to which the gradient of the whole model is clipped, 0 for none: levels are clipped each."""
        return 0.0 if self.levels else self.max_grad_norm

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps` optimizer steps. ValueError if they would fill the run."""
        if self.warmup_steps is None:
            return min(DEFAULT_WARMUP, steps // 4)
        require(
            self.warmup_steps < steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"fewer than the {steps} steps of the run",
        )
        return self.warmup_steps


@dataclass(kw_only=True)
class TrainConfig:
    """A training run: which model, on what data, for how long, written where.

    Args:
        preset: name of the model preset to start from
        model: fields of HopeConfig that differ from the preset, e.g. `--model.num_hidden_layers 2`
        data: the text, its tokenizer and how it is cut into blocks
        optim: optimizer and learning-rate schedule
        output: folder of the run: config.yaml, checkpoints/, tensorboard/, model/, result.json, loss.png,
            positions.png where losses are scored by position, memories.jsonl and memories.png with
            `memory_tokens`
        steps: optimizer steps; default: 1000, or as many as `max_minutes` allows
        max_minutes: instead of `steps`: as many steps as fit into this time, from reading the data to the
            sample, evaluations and checkpoints included; within a tenth, or a step and an evaluation where
            those take longer. The learning rate follows the clock, so the schedule ends properly however fast
            the steps are, but no two runs are equal. A resumed run has the time that remained
        batch_size: sequences per optimizer step, over all processes and accumulation steps
        micro_batch_size: sequences per process and forward pass; gradients are accumulated until
            `batch_size` is reached. Default: batch_size divided by the number of processes
        precision: fp32, or bf16 autocast
        gradient_checkpointing: recompute activations in the backward pass to save memory
        compile: run the model's blocks through torch.compile, which takes a minute or more before the first
            step and needs a compiler (on a CPU one of C++); without one there is a warning, and training
            runs plainly
        eval_every: evaluate every so many steps; default: a fifth of the run (with `max_minutes` only before
            and after, where all would take half of the time). How much text an evaluation reads is
            `data.max_validation_blocks`
        save_every: write a checkpoint every so many steps; default: a quarter of the run
        keep_checkpoints: how many checkpoints to keep
        memory_tokens: at each evaluation let the memories read so many tokens, the first of the validation
            text, and note how far each has moved, its singular values, rates, retentions and recall, in
            memories.jsonl, memories.png and TensorBoard; 0: do not
        sample_tokens: length of the sample generated after training, in tokens; 0 for none
        seed: seed of the initialisation and of dropout; added to `data.seed`, the seed of the data's order
    """

    preset: str = "hope-tiny"
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = "runs/train"
    steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    memory_tokens: int = 0
    sample_tokens: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "micro_batch_size", "eval_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "a whole number of at least 1")
        for name in ("batch_size", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        fits = self.batch_size * (self.steps or 1) <= LARGEST
        require(fits, "batch_size", self.batch_size, f"at most {LARGEST} sequences in all {self.steps} steps")
        few = "0, or 2 tokens or more"
        require(self.memory_tokens == 0 or self.memory_tokens >= 2, "memory_tokens", self.memory_tokens, few)
        require(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, "0 or more tokens")
        require_seed(self.seed)
        require_folder_name("output", self.output)
        require(self.precision in ("fp32", "bf16"), "precision", self.precision, "'fp32' or 'bf16'")
        if self.max_minutes is not None:
            require(
                0 < self.max_minutes < math.inf,
                "max_minutes",
                self.max_minutes,
                "a positive number of minutes",
            )
        if self.steps is not None and self.max_minutes is not None:
            raise ValueError(
                f"steps is {self.steps} and max_minutes is {self.max_minutes}; expected one of them, "
                "as each fixes the length of the run. Leave one out."
            )

    def with_steps(self, steps: int) -> TrainConfig:
        """This run with its length fixed at `steps`, and with the intervals that follow from it."""
        return dataclasses.replace(
            self,
            steps=steps,
            max_minutes=None,
            eval_every=self.eval_every or math.ceil(steps / DEFAULT_EVALS),
            save_every=self.save_every or math.ceil(steps / DEFAULT_SAVES),
        )
