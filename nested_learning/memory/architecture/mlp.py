"""MLP memories with a skip connection: M(x) = x + W1 (hidden layers of x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.architecture.base import (
    Architecture,
    Down,
    Linear,
    Trace,
    hidden_width,
    init_hidden_,
    init_output_,
)
from nested_learning.memory.retention import Retention
from nested_learning.memory.state import Weights
from nested_learning.ops import mlp_memory

LARGEST_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class ResidualMLP(Architecture):
    """M(x) = x + W1 n(σ(W2 x)) (eq 89/91 with a normalised hidden vector), one per head.

    Matrices are numbered from the output: depth 1 is x + W1 x, depth 3 x + W1 n(σ(W2 n(σ(W3 x)))).

    Attributes:
        depth: number of matrices, 1 to 4.
        expansion: width of the hidden layers as a multiple of the head width d.
        activation: σ, "silu" or "gelu".
        norm: "hidden" normalises the input of every matrix after a hidden layer (ours: what DGD requires);
            "output" is MIRAS' M(x) = x + LN(W1 σ(W2 x)).
    """

    name: ClassVar[str] = "mlp"
    skip: ClassVar[bool] = True
    output: ClassVar[str] = "W1"
    depth: int = 2
    expansion: float = 1.0
    activation: mlp_memory.Activation = "silu"
    norm: Literal["hidden", "output"] = "hidden"

    def __post_init__(self) -> None:
        if type(self.depth) is not int or not 1 <= self.depth <= LARGEST_DEPTH:
            raise ValueError(f"depth must be 1 to {LARGEST_DEPTH} matrices, got {self.depth!r}")
        if self.activation not in mlp_memory.ACTIVATIONS:
            raise ValueError(f"activation must be one of {mlp_memory.ACTIVATIONS}, got {self.activation!r}")
        if self.norm not in ("hidden", "output"):
            raise ValueError(f"norm must be 'hidden' or 'output', got {self.norm!r}")

    @property
    def normalises_output(self) -> bool:
        return self.norm == "output"

    @property
    def normalises_input(self) -> bool:
        return self.norm == "hidden" and self.depth > 1

    def check_options(self, given: dict[str, Any]) -> None:
        if self.depth > 1:
            return
        for option in ("expansion", "activation"):
            if option in given:
                raise ValueError(
                    f"{option}={given[option]!r} describes hidden layers, but depth=1 has none; leave it out"
                )

    @property
    def hidden(self) -> list[str]:
        """The matrices before the output, from the input on."""
        return [f"W{i}" for i in range(self.depth, 1, -1)]

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(f"W{i + 1}" for i in range(self.depth))

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        widths = [head_dim, *[hidden_width(self.expansion, head_dim)] * (self.depth - 1), head_dim]
        return {name: (widths[i], widths[i + 1]) for i, name in enumerate(self.matrices)}

    def init_(self, weights: Weights, retention: Retention) -> None:
        if self.norm == "output":
            # Nothing bounds a hidden vector here, and a step at W1 moves the answer by its square: it starts
            # no longer than its input. What the output norm divides by starts near one for the same reason.
            for name in self.hidden:
                retention.init_(weights[name], weights[name].shape[-2] ** -0.5)
            retention.init_(weights["W1"], 1.0)
            return
        for name in self.hidden:
            init_hidden_(weights[name], retention)
        init_output_(weights["W1"], retention)

    def run(self, x: Tensor, linear: Linear) -> Trace:
        inputs, outputs, kept = {}, {}, {}
        for name in self.hidden:
            inputs[name], outputs[name] = x, linear(name, x)
            if self.norm == "hidden":
                x, _, kept[name] = mlp_memory.hidden(outputs[name], self.activation)
            else:
                x = mlp_memory.activate(outputs[name], self.activation)
        inputs["W1"], outputs["W1"] = x, linear("W1", x)
        answer = outputs["W1"]
        if self.norm == "output":
            answer = mlp_memory.output_norm(answer)
        return Trace(answer, inputs, outputs, kept)

    def directions(self, trace: Trace, down: Down, weights: Weights) -> dict[str, Tensor]:
        output, g = down
        if self.norm == "output":
            same, z = output is g, trace.outputs["W1"]
            output = mlp_memory.through_output_norm(output, z)
            g = output if same else mlp_memory.through_output_norm(g, z)
        found, above = {"W1": output}, "W1"
        for name in reversed(self.hidden):
            g = g @ weights[above]
            z = trace.outputs[name]
            if self.norm == "hidden":
                at = mlp_memory.Hidden(trace.inputs[above], z, trace.kept[name])
                g = mlp_memory.through_hidden(at, g, self.activation)
            else:
                g = mlp_memory.through_activation(g, z, self.activation)
            found[name], above = g, name
        return found


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Architecture):
    """M(x) = x + W1 n(silu(W2 x) ⊙ W3 x): a gated hidden layer, normalised like that of `ResidualMLP`.

    Attributes:
        expansion: width of the hidden layer as a multiple of the head width d.
    """

    name: ClassVar[str] = "swiglu"
    skip: ClassVar[bool] = True
    output: ClassVar[str] = "W1"
    expansion: float = 1.0

    @property
    def normalises_input(self) -> bool:
        return True

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("W1", "W2", "W3")

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        width = hidden_width(self.expansion, head_dim)
        return {"W1": (head_dim, width), "W2": (width, head_dim), "W3": (width, head_dim)}

    def init_(self, weights: Weights, retention: Retention) -> None:
        init_output_(weights["W1"], retention)
        for name in ("W2", "W3"):
            init_hidden_(weights[name], retention)

    def run(self, x: Tensor, linear: Linear) -> Trace:
        gate, up = linear("W2", x), linear("W3", x)
        u, inverse_norm = mlp_memory.normalise(F.silu(gate) * up)
        answer = linear("W1", u)
        outputs = {"W1": answer, "W2": gate, "W3": up}
        return Trace(answer, {"W1": u, "W2": x, "W3": x}, outputs, {"inverse_norm": inverse_norm})

    def directions(self, trace: Trace, down: Down, weights: Weights) -> dict[str, Tensor]:
        gate, up = trace.outputs["W2"], trace.outputs["W3"]
        g = down.hidden @ weights["W1"]
        g = mlp_memory.through_norm(g, trace.inputs["W1"], trace.kept["inverse_norm"])
        return {
            "W1": down.output,
            "W2": mlp_memory.through_activation(g * up, gate, "silu"),
            "W3": g * F.silu(gate),
        }
