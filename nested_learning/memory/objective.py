"""Objectives of a memory: the loss that an inner step minimises, as the direction that it writes.

e = M(k) − v̂ is the error at the key. `direction` is minus the gradient at the memory's output. What else a
layer has to know of an objective (how steep it is, whether a closed form exists) are attributes of its class,
so that a new one needs no change elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class AtKey(NamedTuple):
    """A chunk's tokens as an objective sees them; [..., C, d] unless noted."""

    value: Tensor  # v̂, the target
    residual: Tensor  # wanted answer of the weights: v̂ − k of a memory with a skip connection, else v̂
    answer: Tensor  # their answer
    width: Tensor | None  # [..., C] delta_t of Huber's objective

    @property
    def error(self) -> Tensor:
        return self.answer - self.residual


@dataclass(frozen=True)
class Objective:
    """Base of the objectives.

    Attributes:
        name: by which `compose` and configurations call it.
        formula: in a line, as `levels` shows it.
        has_width: whether a data-dependent width per token, a gate of its own, enters the gradient.
        bounded: whether the gradient is at most a constant times 1 + ‖e‖; else it is clipped where a write
            could run away.
        sees_answer: whether the gradient depends on what is stored; −⟨M(k), v̂⟩ does not see it.
        has_token_form: whether a matrix memory has a closed form with the gradient taken at every token.
        goes_with_dgd: whether DGD, which erases the answer and writes the target, has a meaning for it.
        transposed: whether the engine runs on Mᵀ, with the value as its input and the key as its target.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    has_width: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    sees_answer: ClassVar[bool] = True
    has_token_form: ClassVar[bool] = False
    goes_with_dgd: ClassVar[bool] = False
    transposed: ClassVar[bool] = False

    @property
    def steepness(self) -> float:
        """Largest slope of the gradient in the error for ‖e‖ ≤ 1, that of ½‖e‖² being 1: the learning rate
        at which a chunk cannot overshoot is divided by it."""
        return 1.0

    def direction(self, at: AtKey) -> Tensor:
        """Minus the gradient at the memory's output [..., C, d]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dot(Objective):
    """−⟨M(k), v̂⟩, the Hebbian objective; its gradient does not see what is stored.

    Attributes:
        of_residual: take what a skip connection leaves to be learned, −⟨M(k) − k, v̂ − k⟩: with an erase
            this is the exact delta rule, whose fixed point is M(k) = v̂ (ours).
    """

    name: ClassVar[str] = "dot"
    formula: ClassVar[str] = "−⟨M(k), v̂⟩"
    sees_answer: ClassVar[bool] = False
    has_token_form: ClassVar[bool] = True
    goes_with_dgd: ClassVar[bool] = True
    of_residual: bool = True

    def direction(self, at: AtKey) -> Tensor:
        return at.residual if self.of_residual else at.value


@dataclass(frozen=True)
class L2(Objective):
    """½‖e‖² (spec section 3; the ½ is ours)."""

    name: ClassVar[str] = "l2"
    formula: ClassVar[str] = "½‖M(k) − v̂‖²"
    has_token_form: ClassVar[bool] = True
    goes_with_dgd: ClassVar[bool] = True

    def direction(self, at: AtKey) -> Tensor:
        return at.residual - at.answer


@dataclass(frozen=True)
class Lp(Objective):
    """‖e‖_p^p (MIRAS, arXiv 2504.13173): gradient p sign(e) ⊙ |e|^(p−1), with the smooth sign tanh(10 e) and
    |e| = √(e² + 10⁻⁶)."""

    name: ClassVar[str] = "lp"
    formula: ClassVar[str] = "‖M(k) − v̂‖_p^p"
    bounded: ClassVar[bool] = False
    p: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.p < float("inf"):
            raise ValueError(f"p must be a number of at least 1, got {self.p!r}: below 1 nothing is convex")

    @property
    def steepness(self) -> float:
        return max(1.0, self.p * (self.p - 1))

    def direction(self, at: AtKey) -> Tensor:
        e = at.error
        return -self.p * torch.tanh(10 * e) * (e.square() + 1e-6) ** ((self.p - 1) / 2)


@dataclass(frozen=True)
class Huber(Objective):
    """½‖e‖² within a data-dependent width δ_t, linear outside it (MIRAS' Yaad): gradient e where ‖e‖ ≤ δ_t,
    else δ_t e/‖e‖."""

    name: ClassVar[str] = "huber"
    formula: ClassVar[str] = "Huber's, of M(k) − v̂"
    has_width: ClassVar[bool] = True

    def direction(self, at: AtKey) -> Tensor:
        assert at.width is not None  # a gate of its own, by construction of the layer
        e, width = at.error, at.width.unsqueeze(-1)
        norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
        return -e * (width / torch.maximum(norm, width))


@dataclass(frozen=True)
class Oja(Objective):
    """Oja's rule (eq 66-67), M ← αM + η v (k − Mᵀv)ᵀ: the memory learns to give the key back from the value.

    The engine runs on Mᵀ with the value as its input and the key as its target, and reads it transposed.
    """

    name: ClassVar[str] = "oja"
    formula: ClassVar[str] = "½‖k − Mᵀv‖² (Oja)"
    has_token_form: ClassVar[bool] = True
    transposed: ClassVar[bool] = True

    def direction(self, at: AtKey) -> Tensor:
        return at.residual - at.answer


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Dot, L2, Lp, Huber, Oja)}
