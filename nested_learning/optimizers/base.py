"""The base of every optimizer here: groups, checks, closures, skipped steps, checkpoints.

A subclass names its `options`, the hyperparameters of a group with the check of each, hands over the
arguments of its constructor, and has one method, `_directions`, that turns the gradients of a group into
directions u. The base applies

    W ← (1 − lr · weight_decay) W − lr · u.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning._errors import unknown
from nested_learning.optimizers.arithmetic import (  # noqa: F401  also what a subclass computes with
    Group,
    all_finite,
    as_matrix,
    divisible,
    entry,
    learning_rate,
    matrix_shape,
    root_mean_square,
    stored_numbers,
    tensor_bytes,
    unit_matrix,
    work_dtype,
)
from nested_learning.optimizers.checks import FLAG, LEARNING_RATE, NON_NEGATIVE, Check, check_is_state_dict
from nested_learning.optimizers.saved_state import (
    check_name,
    check_shapes,
    foreign,
    header,
    moved,
    other_model,
    restore_scalars,
)
from nested_learning.optimizers.sharded import agreed, aligned, is_sharded, like, local, whole, working

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

MAX_GATHERED = 2**26  # elements of the matrices that are whole at one time where parameters lie in shards

# keys that torch, its schedulers and users keep in a group besides hyperparameters
FOREIGN_KEYS = {
    *("params", "param_names", "name", "initial_lr"),
    *("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),
}


def nonfinite_message(optimizer: Optimizer) -> str:
    """The parameters of an optimizer whose gradients are not finite, in words."""
    named = {
        f"parameter {i} of group {g}, shape {tuple(p.shape)}": p.grad
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p.grad is not None
    }
    flags = torch.tensor([bool(stored_numbers(local(grad)).isfinite().all()) for grad in named.values()])
    home = local(next(iter(named.values()))).device
    finite = agreed(list(named.values()), flags.to(home)).tolist()
    where = [name for name, usable in zip(named, finite, strict=True) if not usable]
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    return (
        f"gradient with NaN or infinite elements ({'; '.join(where[:3])}{more}). No parameter was "
        "changed. Lower the learning rate, clip the gradients, or pass error_if_nonfinite=False to skip."
    )


def load_exactly(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state_dict, and keep none of its tensors: it may be that of an optimizer that goes on.

    Counters and products (0-D) of torch's optimizers keep their dtype too.
    """
    optimizer.load_state_dict(state_dict)
    if isinstance(optimizer, BaseOptimizer):
        return
    restore_scalars(optimizer, state_dict)
    given = {id(t) for t in torch.utils._pytree.tree_leaves(state_dict["state"]) if isinstance(t, Tensor)}
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = torch.utils._pytree.tree_map(lambda t: t.clone() if id(t) in given else t, value)


class BaseOptimizer(Optimizer):
    """Base class; see the module's docstring.

    Every optimizer of this package takes parameter groups, `step(closure)`, learning-rate schedulers and
    GradScaler as torch's do; `add_param_group` works at any time. Parameters may be float64, float32,
    bfloat16 or float16; states are float32 for the last two. Parameters without a gradient are left alone.
    `lr` may be a tensor of one number, which is read on its device at every step. Copies (copy.deepcopy,
    pickle) of a model and its optimizer together go on bit by bit as the originals would, without the hooks
    that were registered. `state_dict`, and torch.distributed.checkpoint's get_optimizer_state_dict, which
    does not keep `skipped_steps`, hold all that a further step depends on.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        arguments: `locals()` of the subclass's constructor. The arguments that `options` names are the
            defaults of a group that does not name them, checked. With `error_if_nonfinite` a gradient that
            has a NaN or infinite element raises FloatingPointError; without it such a step changes neither
            weights nor state, and `skipped_steps` counts it.

    Raises:
        ValueError: a hyperparameter is out of its range, a group has an unknown key, a parameter is
            complex or integer, a gradient is sparse or complex, or a state_dict does not fit.
    """

    options: ClassVar[dict[str, Check]] = {
        "lr": LEARNING_RATE,
        "weight_decay": NON_NEGATIVE,
        "maximize": FLAG,
    }
    one_memory: ClassVar[bool] = False  # parameters of a group share a state, so that all are needed at once
    parameter_shaped: ClassVar[tuple[str, ...]] = ()  # state entries that have their parameter's shape
    is_checked = False  # the gradients of this step were looked at, by the optimizer that holds this one

    def __init__(self, params: Params, arguments: dict[str, Any]) -> None:
        self.error_if_nonfinite: bool = arguments["error_if_nonfinite"]
        self.skipped_steps = 0
        named = [name for name in arguments if name in self.options]
        super().__init__(params, {name: self.options[name].check(name, arguments[name]) for name in named})

    # -- groups

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with hyperparameters of their own or the optimizer's defaults."""
        if isinstance(param_group, dict):
            for key in param_group:
                if key not in self.options and key not in FOREIGN_KEYS:
                    raise unknown(f"option of {type(self).__name__}'s parameter group:", key, self.options)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._refuse_unreal(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_unreal(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError for parameters that are complex or integer."""
        for p in params:
            if not p.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} trains real floating-point parameters, got one of {p.dtype} with "
                    f"shape {tuple(p.shape)}. Store a complex parameter as its real and imaginary parts."
                )

    def _check_group(self, group: Group) -> None:
        """Check every option of a group; a subclass adds the checks of options against each other."""
        for name, option in self.options.items():
            option.check(name, group[name])

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.is_checked or self.gradients_are_usable():
            self._apply()
        return loss

    def _apply(self) -> None:
        """Move the parameters of every group, for gradients that are usable."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            grads = [aligned(p, p.grad).to(work_dtype(p)) for p in params if p.grad is not None]
            if group["maximize"]:
                grads = [-g for g in grads]
            if any(is_sharded(p) for p in params):
                self._move(group, [local(p) for p in params], self._shards(group, params, grads))
            else:
                self._move(group, params, self._directions(group, params, grads))

    def _shards(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """This process's shards of the directions, those that one process with all parameters would have."""
        known = {p for other in self.param_groups for p in other["params"]}
        if any(state and p not in known for p, state in self.state.items()):
            raise ValueError(
                f"{type(self).__name__} holds a state of parameters that were sharded after it was made (a "
                "given preconditioner is one): make the optimizer after fully_shard"
            )
        found: dict[Tensor, Tensor] = {}
        gradients = dict(zip(params, grads, strict=True))
        for part, complete in self._parts(group, params):
            given = [whole(gradients[p]) if complete else local(gradients[p]) for p in part]
            held = group["params"] if self.one_memory else part
            with working(self.state, held, complete):
                directions = self._directions(group, part, given)
            for p, u in zip(part, directions, strict=True):
                found[p] = local(like(p, u, True)) if complete and is_sharded(p) else u
        return [found[p] for p in params]

    def _parts(self, group: Group, params: list[Tensor]) -> list[tuple[list[Tensor], bool]]:
        """Parameters that go through `_directions` together, and whether they have to be whole there."""
        if self.one_memory:
            return [(params, True)]
        parts: list[tuple[list[Tensor], bool]] = []
        elements = 0
        for p in params:
            if self._needs_whole(group, p):
                elements += p.numel()
                if not parts or elements > MAX_GATHERED:
                    parts.append(([], True))
                    elements = p.numel()
                parts[-1][0].append(p)
        single = [p for p in params if not self._needs_whole(group, p)]
        return [*parts, (single, False)] if single else parts

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        """Whether the direction of one element of `p` depends on other elements' gradients."""
        return True

    def gradients_are_usable(self) -> bool:
        """Refuse sparse and complex gradients; skip the step, or raise, for non-finite ones."""
        grads = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"{type(self).__name__} needs dense gradients, got a sparse one for a parameter of "
                        f"shape {tuple(p.shape)}. Use nn.Embedding(..., sparse=False), or SparseAdam for it."
                    )
                grads.append(p.grad)
        if all_finite(grads):
            return True
        if self.error_if_nonfinite:
            raise FloatingPointError(nonfinite_message(self))
        self.skip()
        return False

    def skip(self) -> None:
        """Let a step go by that changes neither weights nor state."""
        self.skipped_steps += 1

    # -- what is collected beside gradients, of which most optimizers have nothing

    def keep_inputs(self, params: Iterable[Tensor]) -> None:
        """Let what came with the gradients of `params` wait for a later step, as these do."""

    def expect_inputs(self, params: Iterable[Tensor], waiting: bool) -> None:
        """Have room in the states of `params` for what will wait so, or where nothing is `waiting` none."""

    def drop_inputs(self, waiting: bool) -> None:
        """Drop what came with the gradients that are there; also what came with `waiting` ones, or not."""

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The directions u, in the parameters' shapes; updates `self.state`, leaves `grads` alone."""
        raise NotImplementedError

    def _move(self, group: Group, params: list[Tensor], directions: list[Tensor]) -> None:
        """W ← (1 − lr·wd) W − lr·u, for all parameters of the group at once."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            for p, u in zip(params, directions, strict=True):
                rate = learning_rate(group, u.device)
                p.copy_(p.to(u.dtype).mul(1 - rate * group["weight_decay"]).sub_(rate * u))
            return
        kept = 1 - lr * group["weight_decay"]
        if any(p.dtype != u.dtype for p, u in zip(params, directions, strict=True)):
            for p, u in zip(params, directions, strict=True):  # decay and step in float32, one rounding
                p.copy_(p.to(u.dtype).mul_(kept).add_(u, alpha=-lr))
            return
        if kept != 1:
            torch._foreach_mul_(params, kept)
        torch._foreach_add_(params, directions, alpha=-lr)

    def _is_probe(self) -> bool:
        """Whether this is the first step, at lr 0 and with zero gradients, so that it can move nothing.

        torch.distributed.checkpoint takes it to learn the names and shapes in the state of a new optimizer.
        """
        groups = self.param_groups
        if any(self.state.values()) or any(group["lr"] != 0 for group in groups):
            return False
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not grads:
            return False
        zero = not any(bool(local(g).any()) for g in grads)
        return bool(agreed(grads, torch.tensor([zero], device=local(grads[0]).device)).all())

    # -- copies

    def _not_copied(self) -> dict[str, Any]:
        """The attributes that a copy does not take over, with the values that they start with."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps the groups, the state and the defaults alone. What wrappers put over a method (a
        # scheduler over `step`) and hooks belong to this object, as they do in torch.
        own = {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith("_optimizer_") and not hasattr(type(self), name)
        }
        return {**own, **self._not_copied()}

    # -- checkpoints

    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer holds between steps."""
        return sum(tensor_bytes(state) for state in self.state.values())

    @property
    def _name(self) -> str:
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict with the optimizer's name, its parameters' shapes and `skipped_steps`."""
        return {
            **super().state_dict(),
            "optimizer": {**header(self), "skipped_steps": self.skipped_steps},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit by bit as the saved optimizer would have.

        Raises:
            ValueError: it was saved by another optimizer, or for parameters of other shapes. Nothing is
                loaded then.
        """

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_state_dict(given)
            loaded.update(given)

        def restore(_: Optimizer) -> None:
            self._restore_dtypes(loaded)
            self.skipped_steps = loaded.get("optimizer", {}).get("skipped_steps", 0)

        # Between the hooks of users: what theirs make of it is loaded, and what they do afterwards stays.
        loaded: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        with before, after:
            super().load_state_dict(state_dict)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_is_state_dict(state_dict)
        check_name(self, state_dict)
        groups = state_dict["param_groups"]
        lacking = sorted({key for group in groups for key in self.options if key not in group})
        if lacking:
            raise foreign(self._name, f"its groups lack {', '.join(lacking)}")
        sizes, own_sizes = [[len(g["params"]) for g in gs] for gs in (groups, self.param_groups)]
        if sizes != own_sizes:
            raise ValueError(
                f"the state_dict has groups of {sizes} parameters, this optimizer of {own_sizes}. Build it "
                "with the same groups, those added later included, before loading."
            )
        check_shapes(self, state_dict)
        for g, (group, saved) in enumerate(zip(self.param_groups, groups, strict=True)):
            for i, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                state = state_dict["state"].get(key, {})
                for shape in (state[name].shape for name in self.parameter_shaped if name in state):
                    if shape != p.shape:
                        raise other_model(g, i, p.shape, shape)

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """torch casts loaded states to the parameter's dtype; ours keep theirs (float32 under bfloat16).

        Where the parameters' own was another, states of that dtype get the one that arithmetic has here.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        said = state_dict.get("optimizer", {}).get("dtypes")
        dtypes = (
            [str(work_dtype(p)) for p in params] if said is None else [d for group in said for d in group]
        )
        for i, p, was in zip(ids, params, dtypes, strict=True):
            if i in state_dict["state"]:
                # torch.distributed.checkpoint fills in {} for what was not saved
                saved = {
                    name: v for name, v in state_dict["state"][i].items() if not isinstance(v, dict) or v
                }
                state[p] = torch.utils._pytree.tree_map(lambda v, p=p, was=was: moved(v, p, was), saved)
        self.state = state
