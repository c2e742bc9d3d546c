"""Optimizers as methods, made by `nested_learning.optimizers.build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from nested_learning.evals.method import Method
from nested_learning.optimizers import build


@dataclass(frozen=True)
class OptimizerMethod(Method):
    """An optimizer by its name in `build`, with options.

    Attributes:
        optimizer: name of the class, in lower case.
        options: of the class.
        weight_decay: as `build` has it; None: the optimizer's default.
    """

    kind: ClassVar[str] = "optimizer"
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)

    def build(self, model: nn.Module, betas: tuple[float, float] | None = None, **more: Any) -> Optimizer:
        """The optimizer of all parameters of a model, at the learning rate of `settings`.

        Args:
            model: matrices that are weights of maps are trained by the optimizer, what it does not take by
                AdamW at the same rate.
            betas: AdamW's, where it is used.
            more: options that the task sets for methods that have them.

        Raises:
            ValueError: there is no learning rate among the settings, or an option that it has not.
        """
        if "lr" not in self.settings:
            raise ValueError(f"{self.name!r} has no learning rate: give the setting lr")
        return build(
            self.optimizer,
            model,
            lr=float(self.settings["lr"]),
            weight_decay=self.weight_decay,
            adamw=None if betas is None else {"betas": betas},
            **{**self.options, **more},
        )


OPTIMIZERS = (
    OptimizerMethod("gradient-descent", "sgd"),
    OptimizerMethod("momentum", "sgd", options={"momentum": 0.9}),
    OptimizerMethod("adam", "adam"),
    OptimizerMethod("adamw", "adamw", weight_decay=0.0),
    OptimizerMethod("muon", "orthogonalmomentum"),
    OptimizerMethod("m3", "m3"),
    OptimizerMethod("dmgd", "deepmomentumgd"),
    OptimizerMethod("delta-momentum", "deltamomentum"),
    OptimizerMethod("dgd", "deltagd"),
)


def optimizers(*names: str) -> list[OptimizerMethod]:
    """The methods of these names, in their order."""
    known = {method.name: method for method in OPTIMIZERS}
    return [known[name] for name in names]


def middle(values: Sequence[float], count: int) -> Sequence[float]:
    """The `count` values in the middle of a grid; all of them where there are no more."""
    first = (len(values) - min(count, len(values))) // 2
    return values[first : first + count]
