"""Architectures of a memory: the map it is, and the writes that one inner step asks of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from nested_learning.ops import mlp_memory
from nested_learning.ops.norm import clip_norm

if TYPE_CHECKING:
    from nested_learning.memory.description import MatrixRule

# How a matrix of the memory acts on an input: linear(name, x) is x Wᵀ for fixed weights, or a read of
# weights that move from token to token.
Linear = Callable[[str, Tensor], Tensor]


class Write(NamedTuple):
    """What one matrix is to learn at each token of a chunk, before the learning rate."""

    x: Tensor  # [..., C, d_in] its input
    direction: Tensor  # [..., C, d_out] minus the gradient at its output
    answer: Tensor  # [..., C, d_out] W x at the anchor, from the forward pass


class Evaluation(NamedTuple):
    """The anchor weights' answers to inputs, kept for the gradient."""

    answer: Tensor  # [..., C, d] W1 n(silu(W2 x)), what M adds to x
    hidden: mlp_memory.Hidden

    def halves(self) -> tuple[Evaluation, Evaluation]:
        """The first and the second half of the tokens."""
        answer, hidden = self.answer.chunk(2, dim=-2), [part.chunk(2, dim=-2) for part in self.hidden]
        first, second = (mlp_memory.Hidden(*(part[i] for part in hidden)) for i in (0, 1))
        return Evaluation(answer[0], first), Evaluation(answer[1], second)


@dataclass(frozen=True, kw_only=True)
class ResidualMLP:
    """M(x) = x + W1 n(silu(W2 x)) (eq 89/91 with a normalised hidden vector), one per head.

    Attributes:
        expansion: width of the hidden layer as a multiple of the head width d.
    """

    expansion: float = 1.0

    def shapes(self, head_dim: int) -> dict[str, tuple[int, int]]:
        """(out, in) of each weight matrix."""
        hidden = round(self.expansion * head_dim)
        if hidden < 1:
            raise ValueError(
                f"expansion={self.expansion} leaves no hidden unit at head width {head_dim}; "
                f"it must be at least {1 / head_dim:g}"
            )
        return {"W1": (head_dim, hidden), "W2": (hidden, head_dim)}

    def init_(self, weights: Mapping[str, Tensor]) -> None:
        """Fill the initial memories: W2 ~ N(0, 1), as its inputs are unit-norm, and W1 ~ N(0, 0.5²/e)."""
        nn.init.normal_(weights["W2"])
        nn.init.normal_(weights["W1"], std=0.5 * weights["W1"].shape[-1] ** -0.5)

    def read(self, x: Tensor, linear: Linear) -> Tensor:
        """M(x) with the matrices acting through `linear`."""
        return x + linear("W1", mlp_memory.hidden(linear("W2", x)).unit)

    def evaluate(self, x: Tensor, weights: Mapping[str, Tensor]) -> Evaluation:
        """The answer to x at the anchor, with what `writes` needs."""
        hidden = mlp_memory.hidden(x @ weights["W2"].mT)
        return Evaluation(hidden.unit @ weights["W1"].mT, hidden)

    def writes(
        self,
        key: Tensor,  # [..., C, d]
        residual: Tensor,  # [..., C, d] target − key, what W1 is to answer
        at_key: Evaluation,
        weights: Mapping[str, Tensor],
        rule: Mapping[str, MatrixRule],
    ) -> dict[str, Write]:
        """The writes of one inner step towards M(key) = key + residual, gradients taken at the anchor."""
        objectives = {matrix_rule.objective for matrix_rule in rule.values()}
        down = {"dot": residual}  # minus the gradient at the output
        if "l2" in objectives:
            down["l2"] = residual - at_key.answer
        d1, d2 = down[rule["W1"].objective], down[rule["W2"].objective]
        d2 = mlp_memory.hidden_gradient(at_key.hidden, d2, weights["W1"])
        return {
            "W1": Write(at_key.hidden.unit, _clipped(d1, rule["W1"]), at_key.answer),
            "W2": Write(key, _clipped(d2, rule["W2"]), at_key.hidden.z),
        }


def _clipped(direction: Tensor, rule: MatrixRule) -> Tensor:
    return direction if rule.clip is None else clip_norm(direction, rule.clip)
