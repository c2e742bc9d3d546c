"""The one configuration of a run of continued pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nested_learning._checks import check_types, require
from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.data.config import DataConfig

ADAPT_LR = 1e-5  # of the base model; its weights have been trained before


@dataclass(kw_only=True)
class AdaptConfig:
    """A run of continued pre-training.

    Args:
        model: folder of the pretrained model and its tokenizer
        data: text; its tokenizer is the model's, and documents are joined whatever `documents` says
        optim: AdamW for the base model, and its schedule
        output: folder of the run
        steps: optimizer steps
        batch_size: texts of `data.block_size` tokens per optimizer step
        background: file of text for levels with an anchor (anchor_kl)
        fisher: file of a Fisher diagonal for levels with a decay; measured on the background if missing
        gradient_checkpointing: run the layers twice to keep less
        eval_every: evaluate every so many steps; default: five times in the run
        save_every: write a checkpoint every so many steps; default: a quarter of the run
        keep_checkpoints: how many checkpoints to keep
        seed: of the order of the data
        starts: file of learned rates and starts for the levels
    """

    model: str
    data: DataConfig = field(default_factory=lambda: DataConfig(block_size=1024, documents="joined"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=ADAPT_LR))
    output: str = "runs/adapt"
    steps: int = 200
    batch_size: int = 4
    background: str | None = None
    fisher: str | None = None
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    seed: int = 0
    starts: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(self.steps >= 1, "steps", self.steps, "a whole number of at least 1")
        if self.data.tokenizer not in (DataConfig().tokenizer, self.model):
            raise ValueError(
                f"data.tokenizer is {self.data.tokenizer!r}, but a pretrained model reads with its own; "
                "leave it out"
            )
        for name in ("carry_state", "score_length"):
            if getattr(self.data, name):
                raise ValueError(
                    f"data.{name} is {getattr(self.data, name)}, but each text of `adapt` is read from its "
                    "beginning, with levels that learn from it alone; leave it out"
                )
        if self.data.bpe_vocab_size != DataConfig().bpe_vocab_size:
            raise ValueError(
                f"data.bpe_vocab_size is {self.data.bpe_vocab_size}, but a pretrained model reads with its "
                "own tokenizer; leave it out"
            )
        # What levels learn of a text is in force in all of it, whatever documents it holds.
        self.data = replace(self.data, documents="joined")
        self.as_training()  # checks the rest

    def as_training(self) -> TrainConfig:
        """The settings of the run that the Trainer needs."""
        return TrainConfig(
            data=self.data,
            optim=self.optim,
            output=self.output,
            batch_size=self.batch_size,
            eval_every=self.eval_every,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
            seed=self.seed,
            steps=self.steps,
        ).with_steps(self.steps)
