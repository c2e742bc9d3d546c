"""Checks of options: each knows what it accepts, and its error says what came and what was expected.

An optimizer names one check per option (`BaseOptimizer.options`); the base class applies it to the default
and to every parameter group.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import Optimizer

from nested_learning._checks import shown


class Check(Protocol):
    """Base of the checks: the values that one option accepts."""

    def check(self, name: str, value: Any) -> Any:
        """Return `value` as it is kept; ValueError, with the option's `name`, where it is not accepted."""


class Bound(NamedTuple):
    """A finite number in low ≤ x ≤ high, without an end that is `open`.

    Also None where it is `optional`, and a tensor of one real number where that may be one (`tensor`).
    """

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    integer: bool = False
    optional: bool = False
    tensor: bool = False

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return value
        number = value
        if self.tensor and isinstance(value, torch.Tensor) and value.numel() == 1:
            number = value.item()
        right_type = not isinstance(number, bool) and isinstance(
            number, int if self.integer else (int, float)
        )
        if (
            not right_type
            or not abs(number) <= sys.float_info.max  # math.isfinite takes no whole number beyond it
            or not self.low <= number <= self.high
            or (self.open_low and number == self.low)
            or (self.open_high and number == self.high)
        ):
            kind = "whole number" if self.integer else "number"
            sign = ">" if self.open_low else ">="
            upto = "" if self.high == math.inf else f" and {'<' if self.open_high else '<='} {self.high:g}"
            also = ". It may also be None" if self.optional else ""
            also += ", or a tensor of one number" if self.tensor and isinstance(value, torch.Tensor) else ""
            raise ValueError(
                f"{name} must be a finite {kind} {sign} {self.low:g}{upto}, got {shown(value)}{also}"
            )
        return value


class Each(NamedTuple):
    """A tuple of numbers, each within `bound`: `length` of them, or as many as come. `expected` says so."""

    bound: Bound
    length: int | None
    expected: str

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        try:
            fits = self.length in (None, len(value)) and not isinstance(value, str)
        except TypeError:  # a single number
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {self.expected}, got {value!r}")
        return tuple(self.bound.check(name, each) for each in value)


class Choice(NamedTuple):
    """One of the `accepted` names."""

    accepted: tuple[str, ...]

    def check(self, name: str, value: Any) -> Any:
        if value not in self.accepted:
            raise ValueError(f"{name} must be one of {', '.join(self.accepted)}; got {value!r}")
        return value


class Flag:
    """True or False, and nothing that merely counts as one."""

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return value


def check_steps_alone(optimizer: Optimizer, holder: str) -> None:
    """ValueError for an optimizer whose step needs a closure, in one that makes its steps for it."""
    needed = [
        name
        for name, parameter in inspect.signature(type(optimizer).step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:  # besides self
        raise ValueError(
            f"{holder} takes optimizers that step on gradients that are there; {type(optimizer).__name__} "
            f"needs {', '.join(needed[1:])} at every step. Use it alone, in a loop of your own."
        )


def check_is_state_dict(state_dict: dict[str, Any]) -> None:
    """ValueError for what no optimizer has saved."""
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"not an optimizer's state_dict: {', '.join(sorted(missing))} missing")


FINITE = Bound(low=-math.inf)
NON_NEGATIVE = Bound()
LEARNING_RATE = Bound(tensor=True)
POSITIVE = Bound(open_low=True)
FRACTION = Bound(high=1.0)
DECAY = Bound(high=1.0, open_high=True)
COUNT = Bound(low=1, integer=True)
TWO_DECAYS = Each(DECAY, 2, "two numbers (β1, β2)")
THREE_DECAYS = Each(DECAY, 3, "three numbers (β1, β2, β3)")
FLAG = Flag()
