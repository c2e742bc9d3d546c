"""The classics as associative memories: (init, update, read) on one tensor, pure and differentiable.

A memory of gradients holds a state. `update` writes a gradient g into it, `read` gives the direction u of
the step W ← W − lr · u. Nothing is changed in place, so gradients flow from a read back to every gradient
that was written: an optimizer's step can be an inner step of something larger.

Equation numbers are those of "Nested Learning" (arXiv 2512.24695). Its sums (eq 101-111) have neither
averages nor bias correction; `adam_optimum` and `adagrad_optimum` are those closed forms. The memories
below compute the same as torch.optim, which replaces the sums by averages and corrects them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from nested_learning._checks import shown
from nested_learning.ops import newton_schulz
from nested_learning.ops.context import traced
from nested_learning.ops.norm import magnitude
from nested_learning.optimizers.arithmetic import Group, as_matrix, divisible, matrix_shape, unit_matrix
from nested_learning.optimizers.base import BaseOptimizer, Params
from nested_learning.optimizers.checks import DECAY, FRACTION, NON_NEGATIVE, TWO_DECAYS, Bound, Choice


class GradientMemory(Protocol):
    """A memory of gradients: three pure functions on the state of one tensor.

    A memory may name in `spare` the fields of its state that `update` does not look at, such as a last
    gradient that is only read: who keeps states from step to step can leave them out.
    """

    def init(self, like: Tensor) -> Any:
        """The empty state for a parameter like `like`: a NamedTuple of tensors of its dtype and device.

        Numbers of writes are float32 at least.
        """

    def update(self, state: Any, grad: Tensor) -> Any:
        """The state after writing `grad`."""

    def read(self, state: Any) -> Tensor:
        """The direction u."""


class GDState(NamedTuple):
    grad: Tensor


@dataclass(frozen=True)
class GDMemory:
    """Gradient descent, eq 1: the memory holds the last gradient only. State: the gradient, 1×."""

    spare: ClassVar[tuple[str, ...]] = ("grad",)

    def init(self, like: Tensor) -> GDState:
        return GDState(torch.zeros_like(like))

    def update(self, state: GDState, grad: Tensor) -> GDState:
        return GDState(grad)  # eq 1: nothing of earlier gradients is kept

    def read(self, state: GDState) -> Tensor:
        return state.grad


class MomentumState(NamedTuple):
    momentum: Tensor


@dataclass(frozen=True)
class MomentumMemory:
    """Momentum, eq 33: a value-less memory with the dot-product objective, m ← α m + g, u = m.

    Equal to torch.optim.SGD(momentum=α). State: m, 1×.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        FRACTION.check("momentum", self.momentum)

    def init(self, like: Tensor) -> MomentumState:
        return MomentumState(torch.zeros_like(like))

    def update(self, state: MomentumState, grad: Tensor) -> MomentumState:
        return MomentumState(self.momentum * state.momentum + grad)  # eq 33: m ← α m + g

    def read(self, state: MomentumState) -> Tensor:
        return state.momentum


class AdamState(NamedTuple):
    mean: Tensor
    square: Tensor
    step: Tensor


@dataclass(frozen=True)
class AdamMemory:
    """Adam, eq 101-105: element by element the best linear map from gradients to √(Σg²).

    m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², u = m̂/(√v̂ + ε), both corrected for their start at zero.
    Equal to torch.optim.Adam. State: m and v, 2×, and the number of writes (0-D). With β₁ = 0 it is the
    gradient divided by its root mean square, as RMSprop with the start corrected, and m the last gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        TWO_DECAYS.check("betas", self.betas)
        NON_NEGATIVE.check("eps", self.eps)

    @property
    def spare(self) -> tuple[str, ...]:
        """Without momentum the mean is the last gradient, which no update looks at."""
        return () if self.betas[0] else ("mean",)

    def init(self, like: Tensor) -> AdamState:
        return AdamState(torch.zeros_like(like), torch.zeros_like(like), _no_writes(like))

    def update(self, state: AdamState, grad: Tensor) -> AdamState:
        beta1, beta2 = self.betas
        grad = grad.to(state.mean.dtype)  # lerp takes one dtype alone
        mean = state.mean.lerp(grad, 1 - beta1)
        square = (beta2 * state.square).addcmul(grad, grad, value=1 - beta2)
        return AdamState(mean, square, state.step + 1)

    def read(self, state: AdamState) -> Tensor:
        corrections = [_one_minus_power(beta, state.step) for beta in self.betas]
        eps = divisible(self.eps, state.square.dtype)
        if traced() or (torch.is_grad_enabled() and state.square.requires_grad):
            mean, square = state.mean / corrections[0], state.square / corrections[1]
            return mean / (_sqrt(square) + eps)  # eq 105: u = m̂/(√v̂ + ε)
        # The same on four passes over memory in place of eight, which is much of what a write costs.
        scale = state.square.sqrt().mul_(corrections[0] / corrections[1].sqrt()).add_(corrections[0] * eps)
        return state.mean / scale


def _no_writes(like: Tensor) -> Tensor:
    """The number of writes, 0-D, at the start: bfloat16 and float16 could not count beyond 256 and 2048."""
    return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 − βᵗ without the cancellation that float32 would suffer at β near 1.

    Before the first write it is that of t = 1, so that an empty average is zero and not 0/0.
    """
    return -torch.expm1(step.clamp(min=1) * (math.log(beta) if beta > 0 else -math.inf))


class AdaGradState(NamedTuple):
    grad: Tensor
    total: Tensor


@dataclass(frozen=True)
class AdaGradMemory:
    """AdaGrad, eq 106-111 with a diagonal H: H ← H + g², u = g/(√H + ε).

    Equal to torch.optim.Adagrad. State: the last gradient and H, 2×.
    """

    spare: ClassVar[tuple[str, ...]] = ("grad",)
    initial: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        NON_NEGATIVE.check("initial", self.initial)
        NON_NEGATIVE.check("eps", self.eps)

    def init(self, like: Tensor) -> AdaGradState:
        return AdaGradState(torch.zeros_like(like), torch.full_like(like, self.initial))

    def update(self, state: AdaGradState, grad: Tensor) -> AdaGradState:
        grad = grad.to(state.total.dtype)  # squared in the state's precision
        return AdaGradState(grad, state.total + grad * grad)  # eq 106-111: H ← H + g²

    def read(self, state: AdaGradState) -> Tensor:
        return state.grad / (_sqrt(state.total) + divisible(self.eps, state.total.dtype))


# P of a preconditioned momentum, and the range of ζ in which a learned one is stable.
PRECONDITIONERS = Choice(("identity", "diagonal", "learned"))
PRECONDITION_LR = Bound(high=2.0, open_high=True)


class DiagonalState(NamedTuple):
    momentum: Tensor
    square: Tensor
    step: Tensor


class LearnedState(NamedTuple):
    momentum: Tensor
    preconditioner: Tensor


@dataclass(frozen=True, eq=False)
class PreconditionedMomentumMemory:
    """Momentum with a preconditioner, eq 47: m ← α m + P g, u = m.

    The same as the optimizer `PreconditionedMomentum`, whose docstring has each P and how a tensor that is no
    matrix becomes one. Gradients flow back to every gradient that was written, to a given P, and through
    every step of a learned one. `torch.func.vmap` runs a batch of them, each row with a state of its own.
    State: m, 1×; with "diagonal" v too and the number of writes (0-D); with "learned" P, min(out, in)².

    Args:
        momentum: α.
        preconditioner: "identity", "diagonal" or "learned".
        given: P in its place, (out, out) or of the parameter's shape; a tensor that may require a gradient,
            part of the memory and not of its state.
        beta2: decay of v ("diagonal").
        eps: ε ("diagonal").
        precondition_lr: ζ ("learned").

    Raises:
        ValueError: an option is out of its range, `given` comes with another preconditioner than "identity",
            or does not fit the parameter (`init`).
    """

    momentum: float = 0.9
    preconditioner: str = "identity"
    given: Tensor | None = None
    beta2: float = 0.999
    eps: float = 1e-8
    precondition_lr: float = 0.1

    def __post_init__(self) -> None:
        FRACTION.check("momentum", self.momentum)
        PRECONDITIONERS.check("preconditioner", self.preconditioner)
        DECAY.check("beta2", self.beta2)
        NON_NEGATIVE.check("eps", self.eps)
        PRECONDITION_LR.check("precondition_lr", self.precondition_lr)
        if self.given is not None and self.preconditioner != "identity":
            raise ValueError(
                f"a given preconditioner takes the place of {self.preconditioner!r}: leave preconditioner "
                "away, or given"
            )

    def init(self, like: Tensor) -> MomentumState | DiagonalState | LearnedState:
        zeros = torch.zeros_like(like)
        if self.given is not None and like.ndim:  # 0-D: only the names of the fields are asked for
            check_given(self.given, like)
        if self.preconditioner == "diagonal":
            return DiagonalState(zeros, torch.zeros_like(like), _no_writes(like))
        if self.preconditioner == "learned":
            side = min(matrix_shape(like))
            return LearnedState(zeros, torch.eye(side, dtype=like.dtype, device=like.device))
        return MomentumState(zeros)

    def update(
        self, state: MomentumState | DiagonalState | LearnedState, grad: Tensor
    ) -> MomentumState | DiagonalState | LearnedState:
        kept, grad = self.momentum * state.momentum, grad.to(state.momentum.dtype)
        if isinstance(state, DiagonalState):
            square = self.beta2 * state.square + (1 - self.beta2) * grad * grad
            step = state.step + 1
            scale = _sqrt(square / _one_minus_power(self.beta2, step)) + divisible(self.eps, grad.dtype)
            return DiagonalState(kept + grad / scale, square, step)  # eq 47: m ← α m + P g
        if isinstance(state, LearnedState):
            P, value = learned_preconditioner(self.precondition_lr, state.preconditioner, grad)
            return LearnedState(kept + value, P)
        return MomentumState(kept + (grad if self.given is None else given_value(self.given, grad)))

    def read(self, state: MomentumState | DiagonalState | LearnedState) -> Tensor:
        return state.momentum


def check_given(P: Tensor, p: Tensor) -> None:
    """ValueError unless P is a preconditioner for a parameter like p: of its shape, or (out, out)."""
    if not isinstance(P, Tensor):
        raise ValueError(f"a given preconditioner is a tensor, got {shown(P)}")
    out = matrix_shape(p)[0]
    if P.shape not in (p.shape, (out, out)):
        raise ValueError(
            f"a given preconditioner has the shape of its parameter {tuple(p.shape)} or ({out}, {out}), got "
            f"shape {tuple(P.shape)}"
        )


def given_value(P: Tensor, g: Tensor) -> Tensor:
    """P g with a matrix P (out, out), or P ⊙ g with a P of g's shape."""
    G = as_matrix(g)
    if P.shape == (G.shape[0], G.shape[0]):
        return (P @ G).view_as(g)
    return P * g


def learned_preconditioner(zeta: float, P: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """P after one step of eq 41 with the L2 objective, and P g; on gᵀ where g is tall, so that P is smaller.

    Where g is zero P stays, and nothing flows back.
    """
    G = as_matrix(g)
    G = G.mT if G.shape[0] > G.shape[1] else G
    present = (G != 0).any()
    unit = unit_matrix(torch.where(present, G, 1))  # the norm of 0 has no derivative
    value = unit_matrix(newton_schulz.quintic(unit))
    P = torch.where(present, torch.addmm(P, P @ unit - value, unit.mT, alpha=-zeta), P)  # eq 41
    result = P @ G
    return P, (result if result.shape == as_matrix(g).shape else result.mT).reshape(g.shape)


def _sqrt(square: Tensor) -> Tensor:
    """√ with the derivative 0 at 0 instead of NaN (an element whose gradients were all zero)."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def adam_optimum(grads: Tensor, target: Tensor, ridge: float = 0.0) -> Tensor:
    """Eq 101-103: argmin over m of Σᵢ‖m ⊙ gᵢ − P‖² + λ‖m‖², which is (H + λ)⁻¹ ⊙ Σgᵢ ⊙ P, H = Σgᵢ².

    P = H gives the sum of gradients, that is momentum (eq 104); P = √H gives Σg/√H (eq 105).

    Args:
        grads: g, [N, ...].
        target: P, [...].
        ridge: λ.
    """
    G, root, s = _in_units(grads, ridge, 0)
    return G.sum(0) * target / (G.square().sum(0) + root.square()) / s


def adagrad_optimum(grads: Tensor, ridge: float = 0.0) -> Tensor:
    """Eq 106-111: H^(−1/2) M̃ with H = Σ gᵢgᵢᵀ and M̃ = Σgᵢ, each coordinate knowing all others.

    The argmin over m of Σᵢ (gᵢᵀm)² − 2⟨m, P gᵢ⟩ + λ‖m‖² is (H + λ)⁻¹ P M̃, with P = (H + λ)^(1/2) here.
    With a diagonal H it is the objective of eq 101, up to a constant.

    Args:
        grads: g, [N, n].
        ridge: λ > 0 where H has no full rank.
    """
    G, root, _ = _in_units(grads, ridge, (0, 1))  # the units cancel
    H = G.T @ G + root.square() * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    values, vectors = torch.linalg.eigh(H)
    return vectors @ ((vectors.T @ G.sum(0)) / values.sqrt())


def _in_units(grads: Tensor, ridge: float, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """g/s, √λ/s and s, with units s in which the squares of both stay in range."""
    root = grads.new_tensor(ridge**0.5)
    s = magnitude(grads, dim)
    s = (torch.maximum(s, magnitude(root)) if ridge else s).squeeze(dim)
    return grads / s, root / s, s


class MemoryOptimizer(BaseOptimizer):
    """Any gradient memory as an optimizer: state ← update(state, g), W ← (1 − lr·wd)W − lr·read(state).

    Acts on parameters of every shape, element by element where the memory does. State: the memory's state.

    Args:
        params: parameters or groups.
        memory: the memory, for all groups: `AdamMemory()`, or any object with init, update and read.
        lr: learning rate.
        weight_decay: decoupled, times lr.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    def __init__(
        self,
        params: Params,
        memory: GradientMemory,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        self.memory = memory
        super().__init__(params, locals())

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        pairs = zip(params, grads, strict=True)
        return [memory_direction(self.memory, self.state[p], g) for p, g in pairs]

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        # Another memory, a subclass of these too, may mix elements whatever it is meant to do.
        return type(self.memory) not in (GDMemory, MomentumMemory, AdamMemory, AdaGradMemory)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._check_state_dict(state_dict)
        fields = set(self.memory.init(torch.zeros(()))._fields)
        for state in state_dict["state"].values():
            if set(state) != fields:
                raise ValueError(
                    f"this state_dict is of another memory: it holds {', '.join(sorted(state))}, "
                    f"{type(self.memory).__name__} holds {', '.join(sorted(fields))}"
                )


def memory_direction(memory: GradientMemory, stored: dict[str, Any], grad: Tensor) -> Tensor:
    """Write `grad` into the memory whose state is the dict `stored`, and read the direction."""
    state = memory.init(grad) if not stored else type(memory.init(grad.new_empty(())))(**stored)
    state = memory.update(state, grad)
    stored.update(state._asdict())
    return memory.read(state)


MEMORIES: dict[str, Callable[[], GradientMemory]] = {
    "gd": GDMemory,
    "momentum": MomentumMemory,
    "adam": AdamMemory,
    "adagrad": AdaGradMemory,
}
