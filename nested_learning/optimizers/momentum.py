"""Momentum as an associative memory that maps gradients to what is to be done about them, eq 47-51.

One recurrence in three optimizers: m ← retain(m, g) + P φ(g), W ← (1 − lr·wd) W − lr·m.

- `PreconditionedMomentum` (eq 47): P, the value that the memory stores for a gradient.
- `DeltaMomentum` (eq 49): retention by the delta rule, which takes out what m held about g.
- `FeatureMomentum` (eq 51): φ, the key that a gradient is stored under.

The paper writes η into the memory (m ← … − η P g, W ← W + m). Here the learning rate stands outside, as in
torch.optim.SGD: the recurrence is linear in m, so a constant rate gives the same weights, and a schedule
acts at once on all that m holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning.ops import newton_schulz
from nested_learning.optimizers.base import (
    DECAY,
    FRACTION,
    NON_NEGATIVE,
    BaseOptimizer,
    Bound,
    Group,
    Params,
    as_matrix,
    root_mean_square,
    work_dtype,
)


class _MomentumRule(BaseOptimizer):
    """m ← retain(m, g) + P φ(g), u = m. The public classes name its parts."""

    bounds: ClassVar[dict[str, Bound]] = {
        "momentum": FRACTION,
        "beta2": DECAY,
        "eps": NON_NEGATIVE,
        "precondition_lr": Bound(high=2.0, open_high=True),
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"preconditioner": ("identity", "diagonal", "learned")}
    parameter_shaped = ("momentum", "square")

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        given: Mapping[Tensor, Tensor] | None,
        error_if_nonfinite: bool,
    ) -> None:
        super().__init__(params, defaults, error_if_nonfinite)
        self._keep_given(given or {})

    def _keep_given(self, given: Mapping[Tensor, Tensor]) -> None:
        known = {p for group in self.param_groups for p in group["params"]}
        for p, P in given.items():
            out = as_matrix(p).shape[0]
            if p not in known or P.shape not in (p.shape, (out, out)):
                what = f"shape {tuple(P.shape)}" if p in known else "one for a parameter of no group"
                raise ValueError(
                    f"a given preconditioner has the shape of its parameter {tuple(p.shape)} or "
                    f"({out}, {out}), got {what}"
                )
            self.state[p]["given"] = P.detach().to(p.device, work_dtype(p), copy=True)

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        states = [self.state[p] for p in params]
        for state, g in zip(states, grads, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(g)
        momenta = [state["momentum"] for state in states]
        self._retain(group, momenta, grads)
        pairs = zip(states, grads, strict=True)
        written = [self._precondition(group, state, self._features(group, g)) for state, g in pairs]
        torch._foreach_add_(momenta, written)
        return momenta

    def _retain(self, group: Group, momenta: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_mul_(momenta, group["momentum"])

    def _features(self, group: Group, g: Tensor) -> Tensor:
        return g

    def _precondition(self, group: Group, state: dict[str, Any], g: Tensor) -> Tensor:
        if "given" in state:
            return _given(state["given"], g)
        if group["preconditioner"] == "diagonal":
            return _diagonal(group["beta2"], group["eps"], state, g)
        if group["preconditioner"] == "learned":
            return _learned(group["precondition_lr"], state, g)
        return g


def _given(P: Tensor, g: Tensor) -> Tensor:
    G = as_matrix(g)
    if P.shape == (G.shape[0], G.shape[0]):
        return (P @ G).view_as(g)
    return P * g


def _diagonal(beta2: float, eps: float, state: dict[str, Any], g: Tensor) -> Tensor:
    if "square" not in state:
        state["square"], state["step"] = torch.zeros_like(g), 0
    state["square"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    state["step"] += 1
    correction = 1 - beta2 ** state["step"]
    return g / (state["square"] / correction).sqrt_().add_(eps)


def _learned(zeta: float, state: dict[str, Any], g: Tensor) -> Tensor:
    """One step of eq 41 with the L2 objective, then P g. Works on the orientation with fewer rows."""
    G = as_matrix(g)
    G = G.mT if G.shape[0] > G.shape[1] else G
    if "preconditioner" not in state:
        state["preconditioner"] = torch.eye(G.shape[0], dtype=g.dtype, device=g.device)
    P = state["preconditioner"]
    unit = _unit(G)
    P.addmm_(P @ unit - _unit(newton_schulz.quintic(G)), unit.mT, alpha=-zeta)
    result = P @ G
    return (result if result.shape == as_matrix(g).shape else result.mT).reshape(g.shape)


def _unit(G: Tensor) -> Tensor:
    """G/‖G‖_F, and 0 for 0."""
    return G / G.norm().clamp(min=torch.finfo(G.dtype).tiny)


class PreconditionedMomentum(_MomentumRule):
    """Momentum with a preconditioner, eq 47: m ← α m + P g, W ← W − lr · m.

    P is one of
    - `"identity"`: ordinary momentum, equal to torch.optim.SGD(momentum=α);
    - `"diagonal"`: P = 1/(√v̂ + ε), v ← β₂v + (1 − β₂)g², v̂ = v/(1 − β₂ᵗ), element by element;
    - `"learned"` (eq 41): a matrix on the shorter side of g, P ← P − ζ (P ĝ − V) ĝᵀ, which is gradient
      descent on ½‖P ĝ − V‖² with ĝ = g/‖g‖_F and V = NS(g)/‖NS(g)‖_F, the orthogonalised gradient of the
      same norm (the paper leaves the value open; it names the orthogonal space as the aim). P starts at I
      and learns before it is used. Stable for ζ < 2, because ‖ĝĝᵀ‖ ≤ 1. Where g is tall, P
      acts from the right;
    - given: `given={parameter: P}` with P of shape (out, out), a matrix product, or of the parameter's own
      shape, a product element by element. Such a parameter ignores `preconditioner`.

    Parameters that are not matrices: (n,) is a row (1, n), (out, a, b, …) is flattened to (out, a·b…). A
    learned P on a row is a scalar.
    State: m, 1×; with "diagonal" 2×; "learned" adds min(out, in)² elements, a given P its own size.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: α.
        preconditioner: "identity", "diagonal" or "learned", per group.
        given: P by parameter. Kept in the state, so that a checkpoint holds it.
        beta2: decay of v ("diagonal").
        eps: ε ("diagonal").
        precondition_lr: ζ ("learned").
        weight_decay: decoupled, times lr.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        preconditioner: str = "identity",
        given: Mapping[Tensor, Tensor] | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        precondition_lr: float = 0.1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "preconditioner": preconditioner,
            "beta2": beta2,
            "eps": eps,
            "precondition_lr": precondition_lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, given, error_if_nonfinite)


class DeltaMomentum(_MomentumRule):
    """Delta momentum, eq 49: before it writes a gradient, the memory forgets what it held about it.

    For g as a matrix (out, in):
    - `scale="normalised"` (ours, the default): m ← α m − β m gᵀg/‖g‖²_F + P g. The erase has norm at most β
      whatever the size of g; g = 0 erases nothing;
    - `scale="paper"`: m ← m (α I − β gᵀg) + P g; the printed form is β = 1. It depends on the units of the
      loss and diverges where β‖g‖² > 1 + α.
    Then W ← W − lr · m. gᵀg is never formed where (m gᵀ) g is cheaper. β = 0 is ordinary momentum.

    Parameters that are not matrices: (n,) is one row (1, n), so that the erase takes out m's component along
    g; (out, a, b, …) is flattened to (out, a·b…).
    State: m, 1×, and that of the preconditioner (see `PreconditionedMomentum`).

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: α.
        beta: β, the strength of the erase, at most 1.
        scale: "normalised" or "paper".
        preconditioner, given, beta2, eps, precondition_lr: as for `PreconditionedMomentum`.
        weight_decay: decoupled, times lr.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    bounds: ClassVar[dict[str, Bound]] = {**_MomentumRule.bounds, "beta": FRACTION}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **_MomentumRule.choices,
        "scale": ("normalised", "paper"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        beta: float = 1.0,
        scale: str = "normalised",
        preconditioner: str = "identity",
        given: Mapping[Tensor, Tensor] | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        precondition_lr: float = 0.1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "beta": beta,
            "scale": scale,
            "preconditioner": preconditioner,
            "beta2": beta2,
            "eps": eps,
            "precondition_lr": precondition_lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, given, error_if_nonfinite)

    def _retain(self, group: Group, momenta: list[Tensor], grads: list[Tensor]) -> None:
        erased = [_erase(group, m, g) for m, g in zip(momenta, grads, strict=True)]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_sub_(momenta, erased)


def _erase(group: Group, m: Tensor, g: Tensor) -> Tensor:
    """β m gᵀg, divided by ‖g‖²_F for the normalised key."""
    M, G = as_matrix(m), as_matrix(g)
    if group["scale"] == "normalised":
        G = _unit(G)
    rows, cols = G.shape
    product = (M @ G.mT) @ G if rows <= cols else M @ (G.mT @ G)
    return (group["beta"] * product).view_as(m)


class FeatureMomentum(_MomentumRule):
    """Momentum with a feature map on the gradient, eq 51: m ← α m + P φ(g), W ← W − lr · m.

    φ is a polynomial with coefficients c₁, c₂, …, element by element:
    - `scale="rms"` (ours, the default): φ(g) = r Σⱼ cⱼ sign(g)|g/r|ʲ with r the root mean square of g. Odd
      and of degree one in g: with cⱼ ≥ 0 it never turns an element's sign, and the units of the loss do not
      matter;
    - `scale="paper"`: φ(g) = Σⱼ cⱼ gʲ. Even powers lose the sign of g, and their share depends on its size.
    c = (1,) is ordinary momentum in both.

    Acts on parameters of every shape. State: m, 1×, and that of the preconditioner.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: α.
        coefficients: (c₁, c₂, …), finite.
        scale: "rms" or "paper".
        preconditioner, given, beta2, eps, precondition_lr: as for `PreconditionedMomentum`, applied to φ(g).
        weight_decay: decoupled, times lr.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    bounds: ClassVar[dict[str, Bound]] = {**_MomentumRule.bounds, "coefficients": Bound(low=-math.inf)}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {**_MomentumRule.choices, "scale": ("rms", "paper")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        coefficients: tuple[float, ...] = (1.0, 0.5),
        scale: str = "rms",
        preconditioner: str = "identity",
        given: Mapping[Tensor, Tensor] | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        precondition_lr: float = 0.1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "coefficients": tuple(coefficients),
            "scale": scale,
            "preconditioner": preconditioner,
            "beta2": beta2,
            "eps": eps,
            "precondition_lr": precondition_lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, given, error_if_nonfinite)

    def _features(self, group: Group, g: Tensor) -> Tensor:
        if group["scale"] == "paper":
            return sum((c * g**j for j, c in enumerate(group["coefficients"], 1)), torch.zeros_like(g))
        r = root_mean_square(g)
        size = g.abs() / r.clamp(min=torch.finfo(g.dtype).tiny)
        powers = sum((c * size**j for j, c in enumerate(group["coefficients"], 1)), torch.zeros_like(g))
        return r * g.sign() * powers
