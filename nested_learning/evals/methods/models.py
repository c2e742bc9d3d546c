"""Models that are trained on a task from random weights: the rows of the paper's tables at one size.

The sequence mixer is what they differ in. The MLPs of a block are widened or narrowed until all rows have as
many parameters as the Transformer, within 1 %; a task without MLPs (MQAR) cannot do so and reports counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning.evals.method import Method
from nested_learning.models import HopeConfig, HopeForCausalLM
from nested_learning.optimizers import build

MLP = 8.0  # hidden units of the Transformer's MLP, of its width: room for what the largest mixer needs more
FAST, SLOW = 8, 2  # chunks of a Hope row's levels: the longest training sequence divided by these
SLOW_PERIOD = 4  # batches whose mean gradient a slow level of a static Hope row steps on; 4² of the next one
PARTS = "memory"  # the mixer that is made of parts: all its options but these are parts
OF_LAYER = ("conv_size", "max_half_life")


@dataclass(frozen=True)
class Size:
    """Size of the models of a task.

    Args:
        vocab_size: ids.
        longest: tokens of the longest training sequence, by which chunks are set.
        width, layers, heads: as in `HopeConfig`.
        chunk: tokens between two writes of a memory, shortened where a sequence has not two of them.
        mlp: blocks have one; False: mixers alone.
        positions: attention turns queries and keys by their places (RoPE); False: it knows no places.
    """

    vocab_size: int
    longest: int
    width: int = 64
    layers: int = 2
    heads: int = 2
    chunk: int = 32
    mlp: bool = True
    positions: bool = True


@dataclass(frozen=True)
class TrainedModel(Method):
    """A causal language model that a task trains from random weights.

    Attributes:
        mixer: name of the sequence mixer.
        options: of the mixer, beside its chunk length; of the mixer "memory" its parts.
        levels: "one" static MLP per block, "periods": a CMS whose slow levels step on the mean of several
            batches, "in context": one that learns by regression while it reads.
        num_levels: levels of the CMS, at equal parameters; two or three.
        heads: of the mixer, where they are not the size's.
    """

    kind: ClassVar[str] = "model"
    mixer: str = "attention"
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    levels: Literal["one", "periods", "in context"] = field(default="one", kw_only=True)
    num_levels: int = field(default=2, kw_only=True)
    heads: int | None = field(default=None, kw_only=True)

    def config(self, size: Size) -> HopeConfig:
        """The model of a size, with as many parameters as the Transformer's.

        `settings` named `mixer.OPTION` are options of the mixer.

        Raises:
            ValueError: a setting that the mixer does not have, or no width of the MLPs gives the count.
        """
        if not size.mlp:
            return _config(self, size, 0)
        return _config(self, size, _matched(self._for_size(), size))

    def new_model(self, size: Size, seed: int) -> nn.Module:
        """A model with random weights: `model(ids).logits` are [B, T, vocab_size]."""
        torch.manual_seed(seed)
        return HopeForCausalLM(self.config(size))

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """AdamW, with a period for each slow level."""
        levels = None
        if self.levels == "periods" and getattr(model.config, "cms_levels", None):
            levels = [
                {"part": f"cms.{level}", "period": SLOW_PERIOD**level, "reduction": "mean"}
                for level in range(1, self.num_levels)
            ]
        return build("adamw", model, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), levels=levels)

    def _for_size(self) -> TrainedModel:
        """The method with nothing that does not decide the model's size but its mixer's options."""
        kept = {key: value for key, value in self.settings.items() if key.startswith("mixer.")}
        return dataclasses.replace(self, settings=kept)


def _config(method: TrainedModel, size: Size, hidden: int) -> HopeConfig:
    """The model with so many hidden units in the MLPs of a block, over all its levels."""
    own = {k.removeprefix("mixer."): v for k, v in method.settings.items() if k.startswith("mixer.")}
    options = {**method.options, **own}
    if method.mixer == "attention":
        if not size.positions:
            options["rope_theta"] = None
    else:
        options.setdefault("chunk_size", max(1, min(size.chunk, size.longest // 2)))
    if method.mixer == PARTS:
        layer = {name: options.pop(name) for name in OF_LAYER if name in options}
        options = {"parts": options, **layer}
    return HopeConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_heads=method.heads or size.heads,
        mixer=method.mixer,
        mixer_options={method.mixer: options},
        cms_levels=_levels(method, size, hidden),
        cms_update="regression" if method.levels == "in context" and hidden else "none",
    )


def _levels(method: TrainedModel, size: Size, hidden: int) -> list[dict[str, Any]]:
    """Levels of the CMS, fast to slow, each chunk a multiple of the one before; none without hidden units."""
    count = 1 if method.levels == "one" else method.num_levels
    wanted = (
        [size.longest // SLOW]
        if count == 1
        else [size.longest // round(FAST * (SLOW / FAST) ** (level / (count - 1))) for level in range(count)]
    )
    chunks = [max(1, wanted[0])]
    for length in wanted[1:]:
        chunks.append(chunks[-1] * max(1, length // chunks[-1]))
    units = [(hidden + level) // count for level in reversed(range(count))]
    return [
        {"chunk_size": chunk, "intermediate_size": each}
        for chunk, each in zip(chunks, units, strict=True)
        if hidden
    ]


def _count(method: TrainedModel, size: Size, hidden: int) -> tuple[int, int]:
    """Parameters of the model, and those that a hidden unit of each block has."""
    with torch.device("meta"):
        model = HopeForCausalLM(_config(method, size, hidden))
    units = sum(p.numel() for name, p in model.named_parameters() if ".cms.blocks." in name and p.dim() > 1)
    return model.num_parameters(), units // hidden


@cache
def _wanted(size: Size) -> int:
    return _count(TrainedModel("transformer", "attention"), size, round(MLP * size.width))[0]


_SOLVED: dict[tuple[str, Size], int] = {}  # by the text of a method, whose mappings have no hash


def _matched(method: TrainedModel, size: Size) -> int:
    """Hidden units of the MLPs of a block that lead to the Transformer's number of parameters."""
    text = repr(method)
    if (text, size) not in _SOLVED:
        wanted, least = _wanted(size), method.num_levels
        base, of_unit = _count(method, size, least)
        hidden = max(least, least + round((wanted - base) / of_unit))
        found = base + (hidden - least) * of_unit
        if abs(found - wanted) > 0.01 * wanted:
            raise ValueError(
                f"{method.name!r} has {found:,} parameters at width {size.width} with {hidden} hidden units; "
                f"expected {wanted:,} within 1 %, as the Transformer. Choose another width"
            )
        _SOLVED[text, size] = hidden
    return _SOLVED[text, size]


MODELS = (
    TrainedModel("transformer", "attention"),
    TrainedModel("linear-attention", "linear_attention"),
    TrainedModel("deltanet", "deltanet"),
    TrainedModel("gated-deltanet", "gated_deltanet"),
    TrainedModel("titans", "titans"),
    TrainedModel("self-modifying-titans", "self_modifying_titans"),
    TrainedModel("hope", "self_modifying_titans", levels="periods"),
    TrainedModel("hope-in-context", "self_modifying_titans", levels="in context"),
    TrainedModel("hope-attention", "attention", levels="periods"),
    TrainedModel("hope-attention-in-context", "attention", levels="in context"),
)
# Attention behind a convolution of the width that the memory layers have by default.
CONVOLVED = TrainedModel("transformer-convolved", "attention", options={"conv_size": 4})
# Titans whose memory learns by delta gradient descent (eq 57) in place of gradient descent.
BY_DGD = TrainedModel("titans-dgd", "titans", options={"rule": "dgd"})
