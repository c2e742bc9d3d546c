"""The matrix memory M(x) = W x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from nested_learning.memory.architecture.base import Architecture, Down, Linear, Trace
from nested_learning.memory.retention import Retention
from nested_learning.memory.state import Weights


@dataclass(frozen=True, kw_only=True)
class Matrix(Architecture):
    """M(x) = W x, one d × d matrix per head: linear attention and its relatives. W starts empty."""

    name: ClassVar[str] = "matrix"
    skip: ClassVar[bool] = False
    output: ClassVar[str] = "W"
    linear: ClassVar[bool] = True

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("W",)

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        return {"W": (head_dim, head_dim)}

    def init_(self, weights: Weights, retention: Retention) -> None:
        if retention.form == "linear":
            nn.init.zeros_(weights["W"])
        else:
            retention.init_(weights["W"], weights["W"].shape[-1] ** -0.5)

    def run(self, x: Tensor, linear: Linear) -> Trace:
        answer = linear("W", x)
        return Trace(answer, {"W": x}, {"W": answer}, {})

    def directions(self, trace: Trace, down: Down, weights: Weights) -> dict[str, Tensor]:
        return {"W": down.output}
