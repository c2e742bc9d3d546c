"""A `MemorySystem` from plain names and numbers, as a configuration file holds them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from nested_learning._errors import unknown
from nested_learning.memory.architecture import ARCHITECTURES, Architecture
from nested_learning.memory.objective import OBJECTIVES, Dot, Lp, Objective
from nested_learning.memory.retention import DecayName, Form, Retention
from nested_learning.memory.system import (
    Gradient,
    MemorySystem,
    Rate,
    Read,
    RuleName,
    learning_rule,
)


def compose(
    *,
    architecture: str = "mlp",
    depth: int | None = None,
    expansion: float | None = None,
    activation: str | None = None,
    norm: str | None = None,
    objective: str = "l2",
    p: float | None = None,
    rule: RuleName = "gd",
    decay: DecayName = "gated",
    form: Form = "linear",
    q: float | None = None,
    gradient: Gradient = "anchor",
    rate: Rate = "gated",
    generated: Sequence[str] = (),
    self_targets: bool = False,
    momentum: bool = False,
    momentum_scaled: bool = True,
    unit: Sequence[str] = ("k", "v", "q"),
    chunk_size: int = 64,
    projection_chunk_size: int | None = None,
    read: Read = "token",
    eta_max: float | None = None,
    projection_eta_max: float | None = None,
) -> MemorySystem:
    """The system with these parts. Long: its signature lists every part that a configuration may name.

    Args:
        architecture: "matrix", "mlp" or "swiglu"; `depth`, `activation` and `norm` belong to "mlp",
            `expansion` to "mlp" and "swiglu"; None for their defaults.
        objective: "dot", "l2", "lp" (with `p`), "huber" or "oja". "dot" is taken literally, −⟨M(k), v̂⟩, under
            gradient descent, and on what the skip connection leaves to be learned under DGD.
        rule: "gd", "dgd" or "dgd_literal", see `learning_rule`.
        decay, form, q: see `Retention`; `q` belongs to form="lq".
        eta_max: upper bound of the inner learning rate, at most 1, or 2 where the rule erases what unit-norm
            inputs answer; None for a bound at which the rule is stable.
        projection_eta_max: the same for the generating memories, from 0 to `eta_max`; None for that.
        The others: see `MemorySystem`.

    Raises:
        ValueError: for a name that does not exist, an option that belongs to another part, or parts that make
            no sense together.
    """
    parts = {"depth": depth, "expansion": expansion, "activation": activation, "norm": norm}
    _check_types(locals())
    built = _architecture(architecture, {name: value for name, value in parts.items() if value is not None})
    if not momentum and not momentum_scaled:
        raise ValueError(
            "momentum_scaled=False is how writes enter a momentum, but momentum=False; leave it out"
        )
    aim = _objective(objective, p, rule)
    retention = _retention(decay, form, q)
    if eta_max is None:
        sizes = [size for size in (chunk_size, projection_chunk_size) if isinstance(size, int)]
        eta_max = stable_eta_max(aim, rule, gradient, max(sizes, default=1))
    elif rate == "one":
        raise ValueError(
            f"eta_max={eta_max} bounds a gated rate, but rate='one' has none; leave one of them out"
        )
    if projection_chunk_size is not None and not generated:
        raise ValueError(
            f"projection_chunk_size={projection_chunk_size} is that of memories that generate signals, but "
            "generated is empty; leave it out"
        )
    return MemorySystem(
        architecture=built,
        rule=learning_rule(built, aim, rule, retention),
        retention=retention,
        gradient=gradient,
        rate=rate,
        generated=tuple(generated),
        self_targets=self_targets,
        momentum=momentum,
        momentum_scaled=momentum_scaled,
        unit=tuple(unit),
        chunk_size=chunk_size,
        projection_chunk_size=projection_chunk_size,
        read=read,
        eta_max=eta_max,
        projection_eta_max=projection_eta_max,
    )


def _check_types(arguments: Mapping[str, Any]) -> None:
    """ValueError for a value that is not of the kind its part takes."""
    for name in ("expansion", "p", "q", "eta_max", "projection_eta_max"):
        value = arguments[name]
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    for name in ("unit", "generated"):
        value = arguments[name]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} must be a list of names, got {value!r}")
    for name in ("architecture", "objective", "rule"):
        if not isinstance(arguments[name], str):
            raise ValueError(f"{name} must be a name, got {arguments[name]!r}")


def compose_parts(parts: Mapping[str, Any]) -> MemorySystem:
    """`compose(**parts)`, with a ValueError that names the nearest part for a name that does not exist."""
    accepted = inspect.signature(compose).parameters
    for name in parts:
        if name not in accepted:
            raise unknown("part of a memory", name, accepted)
    return compose(**parts)


def stable_eta_max(objective: Objective, rule: RuleName, gradient: Gradient, chunk_size: int) -> float:
    """Default bound of the inner learning rate.

    A rule that erases is contracting at any rate below 1, and so is a gradient taken at every token. Without
    erase, gradients taken at the chunk's anchor add up, and η·λ_max(Σ x xᵀ) < 2 must hold over a chunk:
    4 / chunk_size (spec section 3), less where the objective is steeper than ½‖e‖².
    """
    if gradient == "token":
        return 1.0
    if rule != "gd":
        return 0.5
    return min(0.5, 4 / max(chunk_size, 1)) / objective.steepness


def _architecture(name: str, options: dict[str, Any]) -> Architecture:
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    cls = ARCHITECTURES[name]
    accepted = [field.name for field in dataclasses.fields(cls)]
    for option, value in options.items():
        if option not in accepted:
            raise ValueError(
                f"{option}={value!r} is no option of the {name!r} memory, which takes "
                f"{', '.join(accepted) or 'none'}; leave it out"
            )
    built = cls(**options)
    built.check_options(options)
    return built


def _objective(name: str, p: float | None, rule: RuleName) -> Objective:
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    if p is not None and name != "lp":
        raise ValueError(
            f"p={p} is the exponent of objective='lp', but the objective is {name!r}; leave it out"
        )
    if name == "lp":
        return Lp() if p is None else Lp(p)
    if name == "dot":
        return Dot(of_residual=rule != "gd")
    return OBJECTIVES[name]()


def _retention(decay: DecayName, form: Form, q: float | None) -> Retention:
    if q is None:
        return Retention(decay=decay, form=form)
    if form != "lq":
        raise ValueError(f"q={q} is the exponent of form='lq', but the form is {form!r}; leave it out")
    return Retention(decay=decay, form=form, q=q)
