"""Momentum as an associative memory that maps gradients to what is to be done about them, eq 47-51.

Three optimizers, each with W ← (1 − lr·wd) W − lr·m and an m of its own, α the retention of m:

- `PreconditionedMomentum` (eq 47): m ← α m + P g; P is the value that the memory stores for a gradient.
- `DeltaMomentum` (eq 49): m ← α m − β m gᵀg/‖g‖² + P g; the delta rule takes out the
  value that m held for g.
- `FeatureMomentum` (eq 51): m ← α m + P φ(g); φ gives the key that a gradient is stored under.

The paper writes η into the memory (m ← … − η P g, W ← W + m). Here the learning rate stands outside, as in
torch.optim.SGD: the recurrence is linear in m, so a constant rate gives the same weights, and a schedule
acts at once on all that m holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning._checks import shown
from nested_learning.optimizers.arithmetic import (
    Group,
    as_matrix,
    divisible,
    entry,
    matrix_shape,
    root_mean_square,
    unit_matrix,
    work_dtype,
)
from nested_learning.optimizers.base import BaseOptimizer, Params
from nested_learning.optimizers.checks import (
    DECAY,
    FINITE,
    FRACTION,
    NON_NEGATIVE,
    Check,
    Choice,
    Each,
)
from nested_learning.optimizers.memory_forms import (
    PRECONDITION_LR,
    PRECONDITIONERS,
    check_given,
    given_value,
    learned_preconditioner,
)
from nested_learning.optimizers.sharded import whole


class _MomentumRule(BaseOptimizer):
    """The momentum m and the preconditioner P of the public classes, which say how m moves."""

    options: ClassVar[dict[str, Check]] = {
        **BaseOptimizer.options,
        "momentum": FRACTION,
        "preconditioner": PRECONDITIONERS,
        "beta2": DECAY,
        "eps": NON_NEGATIVE,
        "precondition_lr": PRECONDITION_LR,
    }
    parameter_shaped = ("momentum", "square")

    def __init__(self, params: Params, arguments: dict[str, Any]) -> None:
        super().__init__(params, arguments)
        given: Mapping[Tensor, Tensor] = arguments["given"] or {}
        tensors = [*given, *given.values()] if isinstance(given, Mapping) else [given]
        if not all(isinstance(each, Tensor) for each in tensors):
            raise ValueError(f"given must have a tensor P for each of some parameters, got {shown(given)}")
        known = {p for group in self.param_groups for p in group["params"]}
        for p, P in given.items():
            if p not in known:
                raise ValueError(
                    "a given preconditioner is for a parameter of a group, got one of shape "
                    f"{tuple(P.shape)} for a parameter of no group"
                )
            check_given(P, p)
            self.state[p]["given"] = whole(P.detach()).to(p.device, work_dtype(p), copy=True)
        if given:  # so that no parameter's state is there without the others', see `_is_probe`
            for group in self.param_groups:
                params = [p for p in group["params"] if p.requires_grad]
                self._momenta(group, params, [torch.zeros_like(p, dtype=work_dtype(p)) for p in params])

    def _momenta(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The momentum of each parameter, as it stands; makes the states of those that have none."""
        momenta = []
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            momenta.append(entry(state, "momentum", g))
            if "given" in state:
                continue
            if group["preconditioner"] == "diagonal":
                state.setdefault("step", 0)
                entry(state, "square", g)
            elif group["preconditioner"] == "learned" and "preconditioner" not in state:
                side = min(matrix_shape(p))
                state["preconditioner"] = torch.eye(side, dtype=g.dtype, device=g.device)
        return momenta

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        return group["preconditioner"] == "learned" or "given" in self.state.get(p, {})

    def _preconditioned(self, group: Group, params: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
        """P k for each parameter's key k, which is g or φ(g); a preconditioner that learns does so first."""
        return [_precondition(group, self.state[p], k) for p, k in zip(params, keys, strict=True)]


def _precondition(group: Group, state: dict[str, Any], g: Tensor) -> Tensor:
    if "given" in state:
        return given_value(state["given"], g)
    if group["preconditioner"] == "diagonal":
        return _diagonal(group["beta2"], group["eps"], state, g)
    if group["preconditioner"] == "learned":
        P, value = learned_preconditioner(group["precondition_lr"], state["preconditioner"], g)
        state["preconditioner"].copy_(P)
        return value
    return g


def _diagonal(beta2: float, eps: float, state: dict[str, Any], g: Tensor) -> Tensor:
    """P g with P = 1/(√v̂ + ε), v an average of g² and v̂ its correction for the start at zero."""
    square: Tensor = state["square"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    state["step"] += 1
    correction = 1 - beta2 ** state["step"]
    return g / (square / correction).sqrt_().add_(divisible(eps, g.dtype))


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
        super().__init__(params, locals())

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        momenta = self._momenta(group, params, grads)
        torch._foreach_mul_(momenta, group["momentum"])  # eq 47: m ← α m + P g
        torch._foreach_add_(momenta, self._preconditioned(group, params, grads))
        return momenta


class DeltaMomentum(_MomentumRule):
    """Delta momentum, eq 49: before it writes a gradient, the memory forgets the value it held for it.

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

    options: ClassVar[dict[str, Check]] = {
        **_MomentumRule.options,
        "beta": FRACTION,
        "scale": Choice(("normalised", "paper")),
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
        super().__init__(params, locals())

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        momenta = self._momenta(group, params, grads)
        erased = [_erase(group, m, g) for m, g in zip(momenta, grads, strict=True)]
        torch._foreach_mul_(momenta, group["momentum"])  # eq 49: m ← α m − β m gᵀg/‖g‖² + P g
        torch._foreach_sub_(momenta, erased)
        torch._foreach_add_(momenta, self._preconditioned(group, params, grads))
        return momenta

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        return True


def _erase(group: Group, m: Tensor, g: Tensor) -> Tensor:
    """β m gᵀg, divided by ‖g‖²_F for the normalised key."""
    M, G = as_matrix(m), as_matrix(g)
    if group["scale"] == "normalised":
        G = unit_matrix(G)
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

    options: ClassVar[dict[str, Check]] = {
        **_MomentumRule.options,
        "coefficients": Each(FINITE, None, "numbers (c₁, c₂, …)"),
        "scale": Choice(("rms", "paper")),
    }

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
        super().__init__(params, locals())

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        momenta = self._momenta(group, params, grads)
        features = [_features(group, g) for g in grads]
        torch._foreach_mul_(momenta, group["momentum"])  # eq 51: m ← α m + P φ(g)
        torch._foreach_add_(momenta, self._preconditioned(group, params, features))
        return momenta

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        return group["scale"] == "rms" or super()._needs_whole(group, p)


def _features(group: Group, g: Tensor) -> Tensor:
    """φ(g) = Σⱼ cⱼ gʲ, or r Σⱼ cⱼ sign(g)|g/r|ʲ in units of the root mean square r."""
    if group["scale"] == "paper":
        return _polynomial(group["coefficients"], g)
    r = root_mean_square(g)
    size = g.abs() / r.clamp(min=torch.finfo(g.dtype).tiny)
    return r * g.sign() * _polynomial(group["coefficients"], size)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Σⱼ cⱼ xʲ, j from 1."""
    return sum((c * x**j for j, c in enumerate(coefficients, 1)), torch.zeros_like(x))
