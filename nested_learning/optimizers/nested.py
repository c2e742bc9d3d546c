"""Several optimizers as one, each with parameters of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning.optimizers.arithmetic import Group, all_finite
from nested_learning.optimizers.base import BaseOptimizer, load_exactly, nonfinite_message
from nested_learning.optimizers.checks import check_is_state_dict, check_steps_alone
from nested_learning.optimizers.saved_state import check_name, check_shapes, header

# In every state_dict; the rest of an optimizer's own stands in "optimizers".
NAMED = ("state", "param_groups")


class NestedOptimizer(Optimizer):
    """Optimizers that step together, each with parameters of its own.

    To schedulers, GradScaler, transformers' Trainer and torch.distributed.checkpoint it is one optimizer:
    `param_groups` are the groups of all, `state` has the states of all, both live, and its state_dict numbers
    the parameters of all in one row. Copies (copy.deepcopy, pickle) of a model and its optimizer together go
    on as the originals would, as far as the optimizers inside do. Where one of them is of this package, which
    skip (or refuse) a step with a NaN or infinite gradient, all do, whoever has that gradient.

    Args:
        optimizers: one or more. Groups that are added later go to the last one.

    Raises:
        ValueError: there is none, two have a parameter in common, or one needs a closure to step.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            check_steps_alone(optimizer, "NestedOptimizer")
        params = [p for group in self.param_groups for p in group["params"]]
        if not params or len(set(params)) < len(params):
            raise ValueError(
                f"expected optimizers with parameters of their own, got {len(self.optimizers)} with "
                f"{len(params)} parameters, {len(set(params))} of them different"
            )
        self._building = True  # torch's constructor adds a group of all
        # schedulers ask in the defaults whether all groups have a momentum, or betas, to cycle
        shared = set.intersection(*(set(group) for group in self.param_groups)) - {"params"}
        first = self.optimizers[0].defaults
        super().__init__(params, {key: value for key, value in first.items() if key in shared})
        self._building = False

    @property
    def param_groups(self) -> list[Group]:
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        """Set by torch's constructor alone: the groups are the optimizers' own."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of all optimizers by parameter; what is written goes to the parameter's own."""
        return _States(self)  # type: ignore[return-value]

    @state.setter
    def state(self, state: MutableMapping[Tensor, Any]) -> None:
        """Set by torch's constructor alone: the states are the optimizers' own."""

    def owner(self, parameter: Tensor) -> Optimizer:
        """The optimizer that trains a parameter. KeyError where none does."""
        for optimizer in self.optimizers:
            if parameter in optimizer.state:  # sooner than a search of the groups
                return optimizer
        for optimizer in self.optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        raise KeyError("no optimizer trains this parameter")

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with options of the last optimizer, which trains them.

        Raises:
            ValueError: one of the optimizers trains one of them already. Nothing is added then.
        """
        if self._building:
            return
        given = param_group["params"]
        if isinstance(given, Iterator):  # which can be gone through once
            given = list(given)
            param_group = {**param_group, "params": given}
        named = [given] if isinstance(given, Tensor) else given
        added = {each[1] if isinstance(each, tuple) else each for each in named}
        trained = {p for group in self.param_groups for p in group["params"]}
        if twice := added & trained:
            raise ValueError(
                f"{len(twice)} of the {len(added)} parameters of the new group are trained already; expected "
                "parameters that no optimizer here has"
            )
        self.optimizers[-1].add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, and what optimizers hold beside them."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every optimizer; returns what `closure`, called once before, returns.

        Raises:
            FloatingPointError: a gradient has a NaN or infinite element, and one of the optimizers was made
                with `error_if_nonfinite`. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours = self.ours()
        if not _usable(self, ours):
            return loss
        try:
            for each in ours:
                each.is_checked = True
            for optimizer in self.optimizers:
                optimizer.step()
        finally:
            for each in ours:
                each.is_checked = False
        return loss

    def ours(self) -> list[BaseOptimizer]:
        """The optimizers that look at their gradients, of those within others here too."""
        found: list[BaseOptimizer] = []
        for optimizer in self.optimizers:
            if isinstance(optimizer, NestedOptimizer):
                found += optimizer.ours()
            elif isinstance(optimizer, BaseOptimizer):
                found.append(optimizer)
        return found

    # -- copies and checkpoints

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers, "_building": False}

    def state_dict(self) -> dict[str, Any]:
        """The state and groups of all, and in "optimizers" what the state_dict of each has besides these."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        states: dict[int, Any] = {}
        groups: list[Group] = []
        rest = []
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            first = sum(len(group["params"]) for group in groups)
            states |= {first + number: state for number, state in own["state"].items()}
            for group in own["param_groups"]:
                groups.append({**group, "params": [first + number for number in group["params"]]})
            extras = {key: value for key, value in own.items() if key not in NAMED}
            if not hasattr(optimizer, "_check_state_dict"):  # one of torch's, which does not say whose it is
                extras["optimizer"] = header(optimizer)
            rest.append(extras)
        found: dict[str, Any] = {"state": states, "param_groups": groups, "optimizers": rest}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is that of other optimizers, or for other parameters.
        """
        state_dict = state_dict.copy()  # which hooks may change
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_state_dict(state_dict)  # of all of them before any loads
        for optimizer, part in zip(self.optimizers, self._apart(state_dict), strict=True):
            load_exactly(optimizer, part)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, part in zip(self.optimizers, self._apart(state_dict), strict=True):
            check = getattr(optimizer, "_check_state_dict", None)
            if check is None:  # one of torch's
                check_name(optimizer, part)
                check_shapes(optimizer, part)
            else:
                check(part)

    def _apart(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The state_dict of each optimizer, its parameters numbered from 0."""
        check_is_state_dict(state_dict)
        groups = list(state_dict["param_groups"])
        rest = state_dict.get("optimizers", [{}] * len(self.optimizers))
        sizes, own = [[len(group["params"]) for group in each] for each in (groups, self.param_groups)]
        if sizes != own or len(rest) != len(self.optimizers):
            raise ValueError(
                f"the state_dict has {len(rest)} optimizers with groups of {sizes} parameters, here are "
                f"{len(self.optimizers)} with groups of {own}. Build it with the same levels before loading."
            )
        for saved, mine in zip(groups, self.param_groups, strict=True):
            if saved.get("name", mine.get("name")) != mine.get("name"):
                raise ValueError(
                    f"the state_dict has a group of {saved['name']!r} where {mine.get('name')!r} is here. "
                    "Build it with the same levels, in the same order, before loading."
                )
        found = []
        for optimizer, extras in zip(self.optimizers, rest, strict=True):
            taken = [groups.pop(0) for _ in optimizer.param_groups]
            number = {key: place for place, key in enumerate(k for g in taken for k in g["params"])}
            found.append(
                {
                    "state": {number[k]: v for k, v in state_dict["state"].items() if k in number},
                    "param_groups": [{**g, "params": [number[k] for k in g["params"]]} for g in taken],
                    **extras,
                }
            )
        return found


@torch.no_grad()
def _usable(nested: NestedOptimizer, ours: Sequence[BaseOptimizer]) -> bool:
    """Whether all may step: half a step, where one skips it, is none of the model's.

    Args:
        nested: the optimizers.
        ours: those of them that look at their gradients; each skips for itself, or raises.
    """
    pending = [optimizer for optimizer in ours if not optimizer.is_checked]
    if not pending:
        return True
    usable = [optimizer.gradients_are_usable() for optimizer in pending]
    looked_at = {p for optimizer in ours for group in optimizer.param_groups for p in group["params"]}
    params = (p for group in nested.param_groups for p in group["params"] if p not in looked_at)
    if not all_finite([p.grad for p in params if p.grad is not None]):
        if any(optimizer.error_if_nonfinite for optimizer in ours):
            raise FloatingPointError(nonfinite_message(nested))
    elif all(usable):
        return True
    for optimizer, was_usable in zip(pending, usable, strict=True):
        if was_usable:
            optimizer.skip()
    return False


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers, as one mapping by parameter."""

    def __init__(self, nested: NestedOptimizer) -> None:
        self.nested = nested

    def __getitem__(self, parameter: Tensor) -> Any:
        return self.nested.owner(parameter).state[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self.nested.owner(parameter).state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self.nested.owner(parameter).state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self.nested.optimizers)

    def get(self, parameter: Tensor, default: Any = None) -> Any:
        """The state of a parameter that has one; `default` for others, of which none is begun."""
        return self[parameter] if self.__contains__(parameter) else default

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self.nested.optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.nested.optimizers)
