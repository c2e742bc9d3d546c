"""Checks and dtypes of an optimizer's state_dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nested_learning.optimizers.arithmetic import work_dtype

SCALARS = ("step", "mu_product", "mu", "eta")  # 0-D states of torch's optimizers, of 0-D parameters too


def header(optimizer: Optimizer) -> dict[str, Any]:
    """Name of an optimizer, shapes of its parameters and dtypes of their states, for its state_dict."""
    return {
        "name": getattr(optimizer, "_name", type(optimizer).__name__),
        "shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups],
        "dtypes": [[str(work_dtype(p)) for p in group["params"]] for group in optimizer.param_groups],
    }


def check_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """ValueError where a state_dict says that it is of another optimizer."""
    mine = header(optimizer)["name"]
    name = state_dict.get("optimizer", {}).get("name", mine)
    if name != mine:
        raise foreign(mine, f"it was saved by {name}")


def foreign(name: str, why: str) -> ValueError:
    """The error for a state_dict of something else than the optimizer of that name."""
    return ValueError(f"this state_dict does not belong to {name}: {why}. Build that optimizer to load it.")


def check_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """ValueError where a state_dict of as many parameters says that it is for those of another model."""
    saved = state_dict.get("optimizer", {}).get("shapes")
    for g, shapes in enumerate([] if saved is None else header(optimizer)["shapes"]):
        for i, shape in enumerate(shapes):
            if shape != list(saved[g][i]):
                raise other_model(g, i, shape, saved[g][i])


def other_model(group: int, index: int, shape: Iterable[int], saved: Iterable[int]) -> ValueError:
    return ValueError(
        f"the state_dict is for another model: parameter {index} of group {group} has shape {tuple(shape)}, "
        f"the saved one {tuple(saved)}"
    )


def restore_scalars(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put 0-D states as they were saved where torch, in loading, cast them to the parameter's dtype."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(ids, params, strict=True):
        for name, saved in state_dict["state"].get(i, {}).items():
            if (
                isinstance(saved, Tensor)
                and saved.ndim == 0
                and (p.ndim > 0 or name in SCALARS)
                and saved.dtype != optimizer.state[p][name].dtype
            ):
                optimizer.state[p][name] = saved.detach().to(p.device, copy=True)


def moved(value: Any, p: Tensor, was: str) -> Any:
    """A copy of a state's value on the device of p; of p's work dtype, where it `was` of the saved one."""
    if not isinstance(value, Tensor):
        return value
    dtype = work_dtype(p) if str(value.dtype) == was else value.dtype
    return value.detach().to(p.device, dtype, copy=True)
