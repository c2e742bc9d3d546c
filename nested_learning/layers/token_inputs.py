"""Checks shared by layers: of a sequence [B, T, D] or one token per row [B, D], and of their own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nested_learning.layers.initial_memories import InitialMemories
from nested_learning.memory import check
from nested_learning.memory.state import State

_PLAIN = (nn.Linear, nn.Conv1d, nn.RMSNorm, nn.ParameterList, InitialMemories)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is what it was built as, so that its parameters may be read past its forward pass.

    It is not under an adapter or a parametrization (another class), a mask or another hook, offloaded by
    accelerate (a forward of its own), with quantised or sharded weights (tensor subclasses). Hooks that only
    look at what passes say so by an attribute `observes`. See `layers.effective` for what is read instead.
    """
    if type(module) not in _PLAIN or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    if not all(getattr(hook, "observes", False) for hook in module._forward_hooks.values()):
        return False
    return not any(
        type(p) is not nn.Parameter and p is not None and is_traceable_wrapper_subclass(p)
        for p in module._parameters.values()
    )


def as_sequence(
    x: Tensor, width: int, mask: Tensor | None, module: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """x as [B, T, width] and mask as [B, T]; padded tokens become zero vectors.

    Args:
        x: [B, T, width], or [B, width]: one token per row.
        mask: bool of x's shape without its last dimension, True = real token; None: all are real.
        module: one with a `weight`, whose device and dtype x must have (any floating dtype inside an autocast
            region), unless accelerate moves inputs and weights, or the weight is quantised.

    Raises:
        ValueError: where shape, dtype or device do not fit.
        FloatingPointError: for values that are not finite, with NESTED_LEARNING_CHECK=1.
    """
    check_sequence(x, width, mask, module, or_token=True)
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
    if x.dim() == 2:
        return x.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
    return x, mask


def check_sequence(
    x: Tensor, width: int, mask: Tensor | None, module: nn.Module, or_token: bool = False
) -> None:
    """Raise unless x is [B, T, width], or with `or_token` [B, width], and goes with mask and layer.

    Arguments and errors as in `as_sequence`.
    """
    if x.dim() not in ((2, 3) if or_token else (3,)) or x.shape[-1] != width or not x.shape[-2]:
        also = f", or [B, {width}] for one token per row; got" if or_token else ", got"
        raise ValueError(f"x must be [B, T >= 1, {width}]{also} {tuple(x.shape)}")
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        weight = x  # quantised by a module that keeps it to itself, and checks its inputs itself
    if x.device != weight.device and not hasattr(module, "_hf_hook"):
        raise ValueError(f"x is on {x.device}, the layer on {weight.device}; move one with .to(device)")
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast):
        raise ValueError(f"x must be {weight.dtype} as the layer's weights are, got {x.dtype}")
    if mask is not None and (
        mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device
    ):
        raise ValueError(
            f"mask must be bool {tuple(x.shape[:-1])} (True = real token) on {x.device}, got "
            f"{mask.dtype} {tuple(mask.shape)} on {mask.device}; an integer attention mask becomes "
            "one by mask.bool()"
        )
    if check.enabled():
        check.check_values("input", x=x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0))


def check_state(state: State, kind: type[State], x: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `state` is a `kind` on x's device whose tensors have these shapes, batch first."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state must be a {kind.__name__}, got {type(state).__name__}: it is another layer's"
        )
    for name, shape in shapes.items():
        tensor = getattr(state, name)
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f"state.{name} must be {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}: "
                "the state belongs to another batch or to a layer of other sizes"
            )


def check_count(name: str, value: object, least: Literal[0, 1] = 1) -> None:
    """ValueError unless `value` is a positive integer, or 0 where that is the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least else "0 or a positive integer"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
