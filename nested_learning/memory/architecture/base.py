"""Base of the architectures: their matrices, forward pass, and the gradients of one inner step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.retention import Retention
from nested_learning.memory.state import Weights

# How a matrix of the memory acts on an input: linear(name, x) is x Wᵀ for fixed weights, or a read of
# weights that move from token to token.
Linear = Callable[[str, Tensor], Tensor]


class Trace(NamedTuple):
    """One forward pass, kept for the gradient. Tensors are [..., C, width]."""

    answer: Tensor  # part of M(x) that the weights add to the skip connection; all of it without one
    inputs: dict[str, Tensor]  # per matrix W its input x
    outputs: dict[str, Tensor]  # and W x
    kept: dict[str, Tensor]  # further tensors that the architecture's gradient needs

    def halves(self) -> tuple[Trace, Trace]:
        """The first and the second half of the tokens."""
        leaves, spec = pytree.tree_flatten(self)
        parts = [leaf.chunk(2, dim=-2) for leaf in leaves]
        first, second = (pytree.tree_unflatten([part[i] for part in parts], spec) for i in (0, 1))
        return first, second


class Down(NamedTuple):
    """Minus the gradient at the memory's output [..., C, d], for the two kinds of matrices."""

    output: Tensor  # for the output matrix itself
    hidden: Tensor  # for the others, to be carried back


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Base of the architectures: the map that a memory is, one per head of width d.

    Attributes:
        name: by which `compose` and configurations call it.
        skip: whether M(x) = x + answer.
        output: the matrix at the output.
        linear: whether M(x) = W x, of which a gradient at every token has a closed form.
    """

    name: ClassVar[str]
    skip: ClassVar[bool]
    output: ClassVar[str]
    linear: ClassVar[bool] = False

    @property
    def normalises_output(self) -> bool:
        """Whether a norm follows the output matrix, so that the gradient grows as that matrix fades."""
        return False

    @property
    def normalises_input(self) -> bool:
        """Whether the input of the output matrix has a norm of at most 1, however long the memory's is."""
        return False

    def check_options(self, given: dict[str, Any]) -> None:
        """ValueError for an option among those `given` that says nothing in this architecture."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the weight matrices."""
        raise NotImplementedError

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """(out, in) of each weight matrix."""
        raise NotImplementedError

    def init_(self, weights: Weights, retention: Retention) -> None:
        """Fill the initial memories in place."""
        raise NotImplementedError

    def run(self, x: Tensor, linear: Linear) -> Trace:
        """The forward pass, with the matrices acting through `linear`."""
        raise NotImplementedError

    def directions(self, trace: Trace, down: Down, weights: Weights) -> dict[str, Tensor]:
        """Minus the gradient at each matrix's output, by hand, differentiable in everything."""
        raise NotImplementedError

    def read(self, x: Tensor, linear: Linear) -> Tensor:
        """M(x)."""
        answer = self.run(x, linear).answer
        return x + answer if self.skip else answer

    def evaluate(self, x: Tensor, weights: Weights) -> Trace:
        """The forward pass with fixed weights."""
        return self.run(x, lambda name, x: x @ weights[name].mT)


def hidden_width(expansion: float, head_dim: int) -> int:
    """The width of a hidden layer that is `expansion` times as wide as a head."""
    width = round(expansion * head_dim) if 0 < expansion < float("inf") else 0
    if width < 1:
        raise ValueError(
            f"expansion={expansion} leaves no hidden unit at head width {head_dim}; "
            f"it must be at least {1 / head_dim:g}"
        )
    return width


def init_output_(W: Tensor, retention: Retention) -> None:
    """N(0, 0.5²/e): the output matrix, whose inputs are unit-norm, starts by changing little."""
    retention.init_(W, 0.5 * W.shape[-1] ** -0.5)


@torch.no_grad()
def init_hidden_(W: Tensor, retention: Retention) -> None:
    """N(0, 1): inputs are unit-norm, so the pre-activations are of order 1."""
    retention.init_(W, 1.0)
