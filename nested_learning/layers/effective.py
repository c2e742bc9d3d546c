"""Weights of a module as they act: with an adapter, parametrization, mask, quantisation or offload.

Most layers call their modules. A layer that wants a weight itself (a gate that is read out by it, the start
of a fast weight) would pass over whatever a wrapper does in the module's forward pass. So it takes `.weight`
of modules that are plain (`token_inputs.is_plain`) alone; of all others it asks the forward pass, which at
the identity matrix gives the weight, to rounding, with the gradients of all that it is made of.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from nested_learning.layers.token_inputs import is_plain
from nested_learning.ops.context import full_precision


def refuse_change_per_row(module: nn.Module) -> None:
    """ValueError where a peft model has another adapter, or offset of one, for each row of this call.

    peft hands the list of the rows to every layer that has adapters, and such a layer takes what it is called
    with for these rows. A call on anything else (persistent tokens, the identity matrix) would fail, or
    where it has as many rows by chance be answered with the wrong adapters.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, partial) and (found := {"adapter_names", "alora_offsets"} & hook.keywords.keys()):
            raise ValueError(
                f"{found.pop()} gives each row an adapter of its own, and {type(module).__name__} is read "
                "here for all rows at once: call the model for the rows of one adapter at a time "
                "(set_adapter), or leave this layer out of target_modules"
            )


def effective(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with which a linear module acts, in the dtype of its inputs.

    Dropout of an adapter, in training mode, falls on columns of its change here: on an input feature of all
    tokens of the call, not of each token for itself, with the same mean.

    Args:
        module: a linear layer, in whatever wrapper that keeps `in_features`.
        like: a tensor on the device where the module takes its inputs.

    Returns: weight [out, in]; bias [out], zeros where the module has none and is not plain.
    """
    if is_plain(module):
        return module.weight, module.bias  # type: ignore[return-value]
    refuse_change_per_row(module)
    width = int(module.in_features)  # type: ignore[arg-type]
    probe = _input(module, like, (width + 1, width))
    probe.fill_diagonal_(1)  # the last row stays zero: it gives the bias
    with full_precision(like.device):
        y = module(probe)
    return (y[:-1] - y[-1:]).T, y[-1]


def effective_matrix(module: nn.Module, like: Tensor) -> Tensor:
    """Weight [out, in] of a linear layer that is to have no bias; arguments as in `effective`.

    Raises:
        ValueError: for a bias that something has added: a fast weight has no place for it.
    """
    if any(name.rpartition(".")[2] == "bias" for name, _ in module.named_parameters()):
        raise ValueError(
            f"{type(module).__name__} has a bias, which weights that learn in context do not have: use an "
            "adapter without one (lora_bias=False), or cms_update='none'"
        )
    return effective(module, like)[0]


def effective_kernel(conv: nn.Module, like: Tensor) -> Tensor:
    """Kernel [channels, 1, K] of a depthwise causal convolution without a bias, as it acts: its answer to an
    impulse, backwards."""
    if is_plain(conv):
        return conv.weight  # type: ignore[return-value]
    refuse_change_per_row(conv)
    size, channels = int(conv.kernel_size[0]), int(conv.in_channels)  # type: ignore[arg-type, index]
    impulse = _input(conv, like, (1, channels, 2 * size - 1))
    impulse[..., size - 1] = 1
    with full_precision(like.device):
        return conv(impulse).flip(-1).transpose(0, 1)


def effective_gain(norm: nn.Module, size: int, like: Tensor) -> Tensor:
    """Gain [size] of an RMS norm as it acts: its output at equal numbers that are large against its eps."""
    if is_plain(norm):
        return norm.weight  # type: ignore[return-value]
    with full_precision(like.device):
        return norm(_input(norm, like, (size,)).fill_(2.0**13))


def held(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, by name, of a module that others read, such as nn.ParameterList.

    Where accelerate has offloaded them, they are fetched as for a forward pass.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    found = dict(module.items() if hasattr(module, "items") else module._parameters.items())  # type: ignore[operator]
    if hook is not None:
        hook.post_forward(module, None)
    return found


def held_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, or of the copy of it that a wrapper (peft's `modules_to_save`) has in force.

    Raises:
        ValueError: the module is in a wrapper that changes the parameter within its forward pass alone.
    """
    found = held(module).get(name)
    if found is None:
        found = getattr(module, name, None)  # wrappers pass on what they have not themselves
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{type(module).__name__} has no {name} to read outside of its forward pass: leave {name} out of "
            "target_parameters, or train the whole module by modules_to_save"
        )
    return found


def input_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's inputs: that of its weight, float32 where it has none to show."""
    weight = getattr(module, "weight", None)
    if weight is None:  # a wrapper that does not pass it on
        weight = next(module.parameters(), None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32


def _input(module: nn.Module, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, device=like.device, dtype=input_dtype(module))
