"""Parameters that learn at several frequencies, eq 71 at the optimizer, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from nested_learning.optimizers.base import BaseOptimizer, Group, Params, tensor_bytes, work_dtype
from nested_learning.optimizers.checks import COUNT, Check


class MultiFrequency(BaseOptimizer):
    """Groups that accumulate their gradients and step every K steps (eq 71).

    A group with `period` K adds up the gradients of K calls of `step`; the K-th hands their sum or mean to
    the inner optimizer, which then steps for that group. Between, its parameters do not move and the inner
    optimizer's state does not change. A group added later starts its own count. How parameters of each
    shape are trained is up to the inner optimizer.

        MultiFrequency([{"params": fast}, {"params": slow, "period": 16}],
                       inner=lambda groups: torch.optim.AdamW(groups, lr=1e-3))

    `param_groups` are the inner optimizer's own, so learning-rate schedulers work as on it; a schedule
    counts calls of `step`, not steps of a group. A step with a non-finite gradient counts for no group.

    State: the inner optimizer's, and 1× of the parameters of groups with K > 1 (float32 under bfloat16).

    Args:
        params: parameters, or groups with an optional `period` beside the inner optimizer's options.
        inner: makes the inner optimizer from a list of groups; called once. It must leave parameters
            without a gradient alone, as torch's optimizers do, and need no closure.
        period: K of groups that do not name one.
        reduction: "sum" (eq 71) or "mean" over the K gradients.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    options: ClassVar[dict[str, Check]] = {"period": COUNT}  # the others are the inner optimizer's
    parameter_shaped = ("accumulated",)

    def __init__(
        self,
        params: Params,
        inner: Callable[[list[Group]], Optimizer],
        period: int = 1,
        reduction: str = "sum",
        error_if_nonfinite: bool = False,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        self._make_inner = inner
        self._inner: Optimizer | None = None
        super().__init__(params, locals())

    @property
    def inner(self) -> Optimizer:
        """The optimizer that steps."""
        assert self._inner is not None  # built with the first group, in __init__
        return self._inner

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with their `period` and the inner optimizer's options."""
        options = dict(param_group)
        period = options.pop("period", self.defaults["period"])
        self._check_group({"period": period})
        if self._inner is None:
            self._inner = self._make_inner([options])
            if not isinstance(self._inner, Optimizer):
                raise ValueError(f"inner must make a torch optimizer, it made {type(self._inner).__name__}")
        else:
            self._inner.add_param_group(options)
        self._inner.param_groups[-1].update(period=period, accumulated_steps=0)
        self.param_groups = self._inner.param_groups

    def _apply(self) -> None:
        given = {p: p.grad for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["accumulated_steps"] += 1
            if group["period"] > 1:
                self._accumulate(group)
            if group["accumulated_steps"] == group["period"]:
                group["accumulated_steps"] = 0
        if any(p.grad is not None for p in given):
            self.inner.step()
        for p, grad in given.items():
            p.grad = grad

    def _accumulate(self, group: Group) -> None:
        """Eq 71: add the gradients up, and leave in p.grad the total at a period's end, before it None."""
        due = group["accumulated_steps"] == group["period"]
        scale = 1 / group["period"] if self.reduction == "mean" else 1.0
        for p in group["params"]:
            state = self.state[p] if p.grad is not None else self.state.get(p, {})
            if p.grad is not None:
                if "accumulated" not in state:
                    state["accumulated"] = torch.zeros_like(p.grad, dtype=work_dtype(p))
                state["accumulated"].add_(p.grad)
            p.grad = None
            if due and "accumulated" in state:
                p.grad = (scale * state.pop("accumulated")).to(p.dtype)

    # -- checkpoints

    @property
    def _name(self) -> str:
        return f"MultiFrequency({type(self.inner).__name__}, {self.reduction!r})"

    def state_bytes(self) -> int:
        return super().state_bytes() + sum(tensor_bytes(s) for s in self.inner.state.values())

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of any optimizer here, with the inner optimizer's own under "inner"."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, the inner optimizer too; see `BaseOptimizer.load_state_dict`."""
        if "inner" not in state_dict:
            raise ValueError(
                f"this state_dict does not belong to {self._name}: the inner optimizer's part is missing. "
                "If it is the inner optimizer's own, load it into `.inner`."
            )
        self._check_state_dict(state_dict)
        self.inner.load_state_dict(state_dict["inner"])
        super().load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups
