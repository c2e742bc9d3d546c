"""The levels of a continuum memory system: sizes, chunk lengths, and how a level learns in context."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nested_learning._errors import unknown
from nested_learning.layers.cms.block import ACTIVATIONS

VARIANTS = ("sequential", "nested", "independent")
NESTED_GRADIENTS = ("first_order", "exact")
UPDATES = ("none", "regression", "lm")
# "dgd" needs the inputs of the layer; the others are the optimizers' memories of gradients.
RULES = ("gd", "dgd", "momentum", "adam", "adagrad")
# Values that None stands for. At lr 0.1 and clip 1 a write of plain gradient descent moves a block by 0.1
# at most.
DEFAULTS: dict[str, Any] = {
    "heads": 1,
    "lr": 0.1,
    "learn_lr": False,
    "rule": "gd",
    "clip": 1.0,
    "retention": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMSLevel:
    """One level: an MLP block, how often it is updated, and how it learns in context where it does.

    None stands for the default. The options from `lr` on belong to the updates "regression" and "lm" and are
    refused with "none".

    Args:
        chunk_size: tokens between two updates of the block, C of eq 71.
        expansion: hidden width of the block as a multiple of the model's width.
        intermediate_size: hidden width of the block; instead of `expansion`.
        activation: activation of this block, if not the system's.
        heads: with the variant "independent", equal parts of the block, each with its own weight in the sum
            over all parts of all levels (eq 74); default 1. Must divide the hidden width.
        lr: learning rate η of the level's writes; default 0.1. A level with 0 is static.
        learn_lr: make `lr` the initial value of a parameter.
        rule: from the summed, clipped gradient of a chunk to the step: "gd" (default), "momentum", "adam" or
            "adagrad", memory forms with their usual constants; with "regression" also "dgd".
        clip: largest norm of a chunk's summed gradient over the block's matrices, per row; default 1. A
            large number does not clip.
        retention: α in [0, 1], what a write keeps: it first moves the weights to W_init + α (W − W_init);
            default 1.
    """

    chunk_size: int
    expansion: float | None = None
    intermediate_size: int | None = None
    activation: str | None = None
    heads: int | None = None
    lr: float | None = None
    learn_lr: bool | None = None
    rule: str | None = None
    clip: float | None = None
    retention: float | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "intermediate_size", "heads"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not is_count and not (value is None and name != "chunk_size"):
                raise ValueError(f"{name} of a CMS level must be a positive integer, got {value!r}")
        if self.expansion is not None and self.intermediate_size is not None:
            raise ValueError("a CMS level takes expansion or intermediate_size, not both")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise unknown("activation of a CMS level:", str(self.activation), ACTIVATIONS)
        if self.rule is not None and self.rule not in RULES:
            raise unknown("rule of a CMS level:", str(self.rule), RULES)
        for name in ("expansion", "clip"):
            if getattr(self, name) is not None:
                check_positive(f"{name} of a CMS level", getattr(self, name))
        for name, most in (("lr", math.inf), ("retention", 1)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= most and value < math.inf):
                bound = "not negative" if most == math.inf else f"from 0 to {most}"
                raise ValueError(f"{name} of a CMS level must be a number {bound}, got {value!r}")
        if self.learn_lr not in (None, True, False):
            raise ValueError(f"learn_lr of a CMS level must be true or false, got {self.learn_lr!r}")
        if self.learn_lr and self.lr == 0:
            raise ValueError(
                "a CMS level with learn_lr starts from a positive lr, got 0: its logarithm is learned"
            )

    def option(self, name: str) -> Any:
        """An option or, where it is None, its default."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value

    def unusual(self) -> dict[str, Any]:
        """The options that are given and differ from their defaults."""
        given = dataclasses.asdict(self).items()
        return {k: v for k, v in given if v is not None and v != DEFAULTS.get(k)}

    def width(self, hidden_size: int, share: float) -> int:
        """Hidden width of the block; `share` · hidden_size unless the level says otherwise."""
        width = self.intermediate_size
        if width is None:
            expansion = share if self.expansion is None else self.expansion
            width = round(expansion * hidden_size)
            if width < 1:
                raise ValueError(
                    f"an expansion of {expansion:g} leaves the CMS level with chunk_size {self.chunk_size} "
                    f"no hidden unit at hidden_size {hidden_size}; give it at least {1 / hidden_size:g}"
                )
        if width % self.option("heads"):
            raise ValueError(
                f"heads of a CMS level must divide its hidden width {width}, got {self.heads}; "
                "change one of them"
            )
        return width

    @classmethod
    def parse(cls, options: Mapping[str, Any] | CMSLevel) -> CMSLevel:
        """The level that the dict of a configuration describes.

        Raises:
            ValueError: for unknown keys or a missing chunk_size.
        """
        if isinstance(options, CMSLevel):
            return options
        if not isinstance(options, Mapping):
            raise ValueError(f"a CMS level is a dict such as {{'chunk_size': 512}}, got {options!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise unknown("key of a CMS level:", str(key), known)
        if "chunk_size" not in options:
            raise ValueError(f"a CMS level needs a chunk_size, got {dict(options)!r}")
        return cls(**options)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(what: str, value: Any) -> None:
    """ValueError unless `value` is a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r}")


def parse_levels(levels: Iterable[Mapping[str, Any] | CMSLevel]) -> list[CMSLevel]:
    """Check a list of levels, fast to slow, which may be empty: each chunk length divides the next."""
    if isinstance(levels, (Mapping, str)) or not isinstance(levels, Iterable):
        raise ValueError(f"CMS levels are a list such as [{{'chunk_size': 512}}], got {levels!r}")
    parsed = [CMSLevel.parse(level) for level in levels]
    sizes = [level.chunk_size for level in parsed]
    for fast, slow in itertools.pairwise(sizes):
        if slow % fast:
            raise ValueError(
                f"CMS chunk sizes are listed fast to slow and each must divide the next, got {sizes}: "
                f"{fast} does not divide {slow}"
            )
    return parsed


def check_options(levels: Sequence[CMSLevel], variant: str, update: str) -> None:
    """ValueError for an unknown variant or update, and for options of levels that do not go with them."""
    for kind, name, known in (("variant", variant, VARIANTS), ("update", update, UPDATES)):
        if name not in known:
            raise unknown(f"CMS {kind}", str(name), known)
        if not levels and name != known[0]:
            raise ValueError(
                f"CMS {kind} {name!r} says how levels work together or learn, but there are none; give at "
                f"least one level, such as {{'chunk_size': 512}}, or leave the {kind} at {known[0]!r}"
            )
    for level in levels:
        if level.heads is not None and variant != "independent":
            raise ValueError(
                f"heads of a CMS level belong to variant 'independent' (eq 74), not to {variant!r}: "
                "in a chain a level is one block"
            )
        for name in ("lr", "learn_lr", "rule", "clip", "retention"):
            if update == "none" and getattr(level, name) is not None:
                raise ValueError(
                    f"{name} of a CMS level needs update 'regression' or 'lm': with 'none' no level learns "
                    "in context"
                )
        if level.rule == "dgd" and (update != "regression" or variant == "nested"):
            raise ValueError(
                "rule 'dgd' of a CMS level needs update 'regression' and another variant than 'nested': the "
                "delta rule follows the inputs of one memory, 'lm' and initial states have sums of gradients"
            )


def check_nested_gradient(name: str, variant: str, update: str) -> None:
    """ValueError for an unknown nested gradient, or an exact one where there is none."""
    if name not in NESTED_GRADIENTS:
        raise unknown("nested_gradient of a CMS", str(name), NESTED_GRADIENTS)
    if name == "exact" and (variant != "nested" or update != "regression"):
        raise ValueError(
            "nested_gradient 'exact' of a CMS needs variant 'nested', where a level learns another one's "
            f"initial state, and update 'regression', got {variant!r} and {update!r} ('lm' would take "
            "another pass of the whole model over each slow chunk)"
        )


def learning_levels(levels: Sequence[CMSLevel], variant: str, update: str) -> list[int]:
    """Indices of the levels that have a state: with a learning rate, or an initial state that is learned."""
    if update == "none":
        return []
    slower = [*levels[1:], None] if variant == "nested" else [None] * len(levels)
    return [
        index
        for index, (level, next_level) in enumerate(zip(levels, slower, strict=True))
        if level.option("lr") > 0 or (next_level is not None and next_level.option("lr") > 0)
    ]
