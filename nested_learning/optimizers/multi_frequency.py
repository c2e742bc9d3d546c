"""Parameters that learn at several frequencies, eq 71 at the optimizer, around any optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from nested_learning._errors import unknown
from nested_learning.ops.norm import magnitude
from nested_learning.optimizers.arithmetic import Group, all_finite, work_dtype
from nested_learning.optimizers.base import (
    FOREIGN_KEYS,
    BaseOptimizer,
    Params,
    load_exactly,
    nonfinite_message,
)
from nested_learning.optimizers.checks import COUNT, Bound, Check, check_steps_alone
from nested_learning.optimizers.nested import NestedOptimizer
from nested_learning.optimizers.sharded import whole

NORM = Bound(open_low=True, optional=True)
COUNTED_KEYS = ("accumulated_steps",)  # kept in a group besides its options
WAITING = ("accumulated", "gradients")  # in a state: the sum of the period's gradients, and their number


class MultiFrequency(BaseOptimizer):
    """Groups that accumulate their gradients and step every K steps (eq 71).

    A group with `period` K adds up the gradients of K calls of `step`; the K-th hands their sum or mean to
    the inner optimizer, which then steps for that group. Between, its parameters do not move and the inner
    optimizer's state does not change. A group added later starts its own count. A `period` that is lowered
    to what a group has waited for, or less, ends the block at the next step. How parameters of each shape are
    trained is up to the inner optimizer.

        MultiFrequency([{"params": fast}, {"params": slow, "period": 16}],
                       inner=lambda groups: torch.optim.AdamW(groups, lr=1e-3))

    `param_groups` and `state` are the inner optimizer's own, so learning-rate schedulers work as on it; a
    schedule counts calls of `step`, not steps of a group. A step with a non-finite gradient counts for no
    group. Groups whose sums are beyond what their dtype holds, of gradients that are not, skip their step and
    begin a new block.

    State: the inner optimizer's, and 1× of the parameters of groups with K > 1 (float32 under bfloat16).

    Args:
        params: parameters, or groups with an optional `period` beside the inner optimizer's options.
        inner: makes the inner optimizer from a list of groups; called once, with the first. It must leave
            parameters without a gradient alone, as torch's optimizers do, and need no closure. Groups that it
            adds of its own have the period of the first.
        period: K of groups that do not name one.
        reduction: "sum" (eq 71) or "mean" over the K gradients.
        max_grad_norm: norm to which the gradients are clipped that the inner optimizer is about to see, those
            of all groups that step at the same call together; None: they are not clipped.
        error_if_nonfinite: see `BaseOptimizer`.

    Raises:
        ValueError: an option is out of its range, a group has a key that neither this nor the inner optimizer
            knows, or a parameter is complex or integer.
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
        max_grad_norm: float | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        self.max_grad_norm = NORM.check("max_grad_norm", max_grad_norm)
        self._make_inner = inner
        self._inner: Optimizer | None = None
        super().__init__(params, locals())
        del self._make_inner  # a copy of the optimizer needs no recipe, which may be one that pickle refuses

    @property
    def param_groups(self) -> list[Group]:
        """The inner optimizer's groups, with their `period`."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if self._inner is not None:
            self._inner.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimizer's state; while it does not step, with the gradients that wait in it."""
        return self.inner.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._inner is not None:
            self._inner.state = state

    def __getstate__(self) -> dict[str, Any]:
        inner, waiting = _set_apart(self.inner)
        return {**super().__getstate__(), "_inner": inner, "_waiting": waiting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        waiting = rest.pop("_waiting", {})
        for name in ("param_groups", "state"):
            if name in rest:
                setattr(self, name, rest.pop(name))
        super().__setstate__(rest)
        for p, sums in waiting.items():
            self.state[p].update(sums)

    @property
    def inner(self) -> Optimizer:
        """The optimizer that steps."""
        assert self._inner is not None  # built with the first group, in __init__
        return self._inner

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with their `period` and the inner optimizer's options."""
        options = {key: value for key, value in param_group.items() if key not in COUNTED_KEYS}
        period = options.pop("period", self.defaults["period"])
        self._check_group({"period": period})
        if isinstance(options.get("params"), Iterator):  # which `inner` may want to go through twice
            options["params"] = list(options["params"])
        if self._inner is None:
            self._inner = self._make_inner([options])
            if not isinstance(self._inner, Optimizer):
                raise ValueError(f"inner must make a torch optimizer, it made {type(self._inner).__name__}")
            check_steps_alone(self._inner, "MultiFrequency")
            # schedulers ask there whether there is a momentum, or betas, to cycle
            self.defaults = {**self._inner.defaults, **self.defaults}
            self._check_keys(options)
        else:
            self._check_keys(options)
            self._inner.add_param_group(options)
        new = [group for group in self._inner.param_groups if "period" not in group]
        try:  # the parameters as the inner optimizer takes them, from whatever they were given as
            self._refuse_unreal(p for group in new for p in group["params"])
        except ValueError:
            self._drop(new)
            raise
        for group in new:
            group.update(period=period, accumulated_steps=0)

    def _drop(self, groups: list[Group]) -> None:
        """Take groups out of the optimizers that hold them."""
        for holder in (self.inner, *getattr(self.inner, "optimizers", ())):
            held = holder.param_groups
            held[:] = [group for group in held if not any(group is other for other in groups)]

    def _check_keys(self, group: Group) -> None:
        """Raise ValueError for a key that neither this nor the inner optimizer knows."""
        inner = type(self.inner).__name__
        known = {"period"}
        for each in (self.inner, *getattr(self.inner, "optimizers", ())):  # a NestedOptimizer has no defaults
            known |= {*each.defaults, *getattr(each, "options", ())}
        for key in group:
            if key not in known and key not in FOREIGN_KEYS:
                raise unknown(f"option of MultiFrequency's parameter group around {inner}:", key, known)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what the inner optimizer holds beside them; what waits stays."""
        self.inner.zero_grad(set_to_none)

    def skip(self) -> None:
        """Let a step go by, with the inputs that were collected for it."""
        super().skip()
        for each in self._inside():
            each.drop_inputs(waiting=False)

    def _inside(self) -> list[BaseOptimizer]:
        """The optimizers of this package inside, which may collect something beside gradients."""
        if isinstance(self.inner, NestedOptimizer):
            return self.inner.ours()
        return [self.inner] if isinstance(self.inner, BaseOptimizer) else []

    def _apply(self) -> None:
        given = {p: p.grad for group in self.param_groups for p in group["params"]}
        probe = self._is_probe()  # then every group takes part, so that every state is there
        groups = [(g, probe or g["accumulated_steps"] + 1 >= g["period"]) for g in self.param_groups]
        waiting: dict[Tensor, dict[str, Any]] = {}
        # Nothing is counted before the inner optimizer has stepped: where it refuses to, all is as it was.
        try:
            for group, steps in groups:
                if steps:
                    waiting |= self._hand_over(group)
                    continue
                for p in group["params"]:
                    p.grad = None
            due = [p for p in given if p.grad is not None]
            if due and (not waiting or self._is_finite(due)):
                if self.max_grad_norm is not None:
                    _clip_gradients(due, self.max_grad_norm)
                self.inner.step()
        finally:
            for p, grad in given.items():
                p.grad = grad
            for p, sums in waiting.items():
                self.state[p].update(sums)
        for group, steps in groups:
            if steps:
                self._begin_anew(group)
            else:
                self._accumulate(group)
            group["accumulated_steps"] = 0 if steps else group["accumulated_steps"] + 1

    def _is_finite(self, due: list[Tensor]) -> bool:
        """Whether sums of finite gradients are: these may be beyond what the dtype holds."""
        if all_finite([p.grad for p in due if p.grad is not None]):
            return True
        if self.error_if_nonfinite:
            raise FloatingPointError(nonfinite_message(self))
        self.skip()
        for each in self._inside():  # the sums are dropped, and so is what they came from
            each.drop_inputs(waiting=True)
        return False

    def _hand_over(self, group: Group) -> dict[Tensor, dict[str, Any]]:
        """Move the totals to p.grad. Returns what was taken from each state meanwhile."""
        scale = 1 / (group["accumulated_steps"] + 1) if self.reduction == "mean" else 1.0
        taken: dict[Tensor, dict[str, Any]] = {}
        for p in group["params"]:
            waiting = {name: self.state[p].pop(name) for name in WAITING if name in self.state.get(p, {})}
            if waiting:
                taken[p] = waiting
                if p.grad is not None or waiting["gradients"]:
                    total = waiting["accumulated"]
                    total = total if p.grad is None else total + p.grad
                    p.grad = (scale * total).to(p.dtype)
            elif p.grad is not None and scale != 1:
                p.grad = (scale * p.grad.to(work_dtype(p))).to(p.dtype)
        return taken

    def _begin_anew(self, group: Group) -> None:
        """After a step: sums of zero, and none in a group that has nothing to wait for."""
        for p in group["params"]:
            state = self.state.get(p, {})
            if group["period"] == 1:
                for name in WAITING:
                    state.pop(name, None)
            elif "accumulated" in state:
                state["accumulated"].zero_()
                state["gradients"] = 0
            elif p.grad is not None:
                self.state[p].update(_no_sum(p.grad, work_dtype(p)))
        for each in self._inside():
            with_gradient = [p for p in group["params"] if p.grad is not None]
            each.expect_inputs(with_gradient, waiting=group["period"] > 1)

    def _accumulate(self, group: Group) -> None:
        """Eq 71: add the gradients up."""
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if "accumulated" not in state:
                    state.update(_no_sum(p.grad, work_dtype(p)))
                state["accumulated"].add_(p.grad)
                state["gradients"] += 1
        for each in self._inside():
            each.keep_inputs(p for p in group["params"] if p.grad is not None)

    # -- checkpoints

    @property
    def _name(self) -> str:
        return f"MultiFrequency({type(self.inner).__name__}, {self.reduction!r})"

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of any optimizer here, the inner optimizer's state in it.

        Under "inner" stands what the inner optimizer's own state_dict has besides a state and groups.
        """
        inner = {k: v for k, v in self.inner.state_dict().items() if k not in ("state", "param_groups")}
        return {**super().state_dict(), "inner": inner}

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups", [])
        if "inner" not in state_dict and any("period" not in group for group in groups):
            raise ValueError(
                f"this state_dict does not belong to {self._name}: its groups have no period. "
                "If it is the inner optimizer's own, load it into `.inner`."
            )
        super()._check_state_dict(state_dict)
        check = getattr(self.inner, "_check_state_dict", None)
        if check is not None:
            check(_apart(state_dict)[0])

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """The inner optimizer's state as that loads it, then the gradients that wait, in their dtype."""
        inner, waiting = _apart(state_dict)
        load_exactly(self.inner, inner)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if waiting.get(i):
                total = waiting[i]["accumulated"].detach().to(p.device, work_dtype(p), copy=True)
                self.state[p].update(accumulated=total, gradients=waiting[i].get("gradients", 1))


def _no_sum(grad: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What waits in the state of a parameter before its first gradient."""
    return {"accumulated": torch.zeros_like(grad, dtype=dtype), "gradients": 0}


def _set_apart(optimizer: Optimizer) -> tuple[Optimizer, dict[Tensor, dict[str, Any]]]:
    """What a copy is made of: the inner optimizer without states that only gradients wait in, and those.

    torch's optimizers look, when they are copied, for their own entries in every state that is not empty,
    and before a group's first step there are none. Where no state is such a one, the optimizer is itself.
    """
    if isinstance(optimizer, BaseOptimizer):
        return optimizer, {}
    if isinstance(optimizer, NestedOptimizer):
        parts = [_set_apart(each) for each in optimizer.optimizers]
        waiting = {p: sums for _, each in parts for p, sums in each.items()}
        changed: dict[str, Any] = {"optimizers": [each for each, _ in parts]}
    else:
        waiting = {p: sums for p, sums in optimizer.state.items() if sums and set(sums) <= set(WAITING)}
        rest = {p: state for p, state in optimizer.state.items() if p not in waiting}
        changed = {"state": defaultdict(dict, rest)}
    if not waiting:
        return optimizer, {}
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update({**vars(optimizer), **changed})
    return stand_in, waiting


def _apart(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """The inner optimizer's state_dict, and by parameter the gradients that wait."""
    states, inner = state_dict["state"], state_dict.get("inner", {})
    if "state" in inner:  # a file of an earlier version
        return inner, states
    waiting = {i: {k: v for k, v in state.items() if k in WAITING} for i, state in states.items()}
    own = {i: {k: v for k, v in state.items() if k not in WAITING} for i, state in states.items()}
    own = {i: state for i, state in own.items() if state}
    return {"state": own, "param_groups": state_dict["param_groups"], **inner}, waiting


def _clip_gradients(params: Sequence[Tensor], limit: float) -> None:
    """torch's clip_grad_norm_, also where the norm of finite gradients is beyond what their dtype holds."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = get_total_norm(grads)
    if bool(whole(norm).isfinite()):
        clip_grads_with_norm_(params, limit, norm)
        return
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    s = magnitude(whole(get_total_norm(grads, math.inf)).to(dtype)).item()
    factor = limit / s / whole(get_total_norm([g.to(dtype) / s for g in grads])).item()
    for grad in grads:
        grad.mul_(factor)
