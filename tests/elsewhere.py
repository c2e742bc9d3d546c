"""A second device for machines that have none: tensors that say they are on a GPU, with the CPU's numbers.

`elsewhere()` is a scope in which the device "cuda" can be used without one. What is made there is a wrapper
around a tensor of the CPU, which does every operation; but one on tensors of both devices fails, as on a GPU,
and so does a look at the numbers by numpy. The code of this package then runs as on a GPU, kernels apart:
tests/gpu asks a GPU itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
HIDDEN = torch.device("meta")  # where torch's own code believes the wrappers to be
aten = torch.ops.aten
# What takes tensors of both devices on a GPU too: copies, and indices of the CPU, which are sent.
BOTH = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Elsewhere(Tensor):
    """A tensor that says that it is on the GPU; `inner` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=HIDDEN,
        )
        tensor.inner = inner
        return tensor

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    numpy = __array__

    def tolist(self) -> Any:
        return self.inner.detach().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = Elsewhere(self.inner.detach().clone())
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in BOTH:
            refuse_both(func, (args, kwargs))
        if kwargs.get("device") == HIDDEN:
            kwargs = kwargs | {"device": torch.device("cpu")}
        found = func(*unwrapped(args), **unwrapped(kwargs))
        return return_and_correct_aliasing(func, args, kwargs, wrapped(found))


class Factories(TorchDispatchMode):
    """What torch's own code makes beside a wrapper, as zeros for a gradient that is not there, is one too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_tensors = any(isinstance(leaf, Tensor) for leaf in tree_flatten((args, kwargs))[0])
        if of_tensors or kwargs.get("device") != HIDDEN or Devices.meta:
            return func(*args, **kwargs)
        return wrapped(func(*args, **kwargs | {"device": torch.device("cpu")}))


def unwrapped(tree: Any) -> Any:
    """The tensors of the CPU in place of the wrappers."""
    return tree_map_only(Elsewhere, lambda tensor: tensor.inner, tree)


def wrapped(tree: Any) -> Any:
    """Wrappers in place of tensors of the CPU."""
    return tree_map_only(Tensor, lambda t: t if isinstance(t, Elsewhere) else Elsewhere(t), tree)


def refuse_both(func: Any, tree: Any) -> None:
    """Raises where one tensor is here and another elsewhere; numbers without dimensions may be here."""
    tensors = [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
    if any(not isinstance(tensor, Elsewhere) and tensor.dim() for tensor in tensors):
        shapes = [(tuple(t.shape), "cuda" if isinstance(t, Elsewhere) else "cpu") for t in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, found for {func} {shapes}")


class Sent(torch.autograd.Function):
    """A tensor of the CPU, elsewhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return Elsewhere(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return Fetched.apply(gradient)


class Fetched(torch.autograd.Function):
    """A tensor from elsewhere, on the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.inner.detach().clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return Sent.apply(gradient)


def is_elsewhere(device: Any) -> bool:
    """Whether a device, or its name or number, is the second one."""
    return isinstance(device, int) or torch.device(device).type == "cuda"


def on(tensor: Tensor, device: Any) -> Tensor:
    """The tensor on a device."""
    there = is_elsewhere(device)
    if there == isinstance(tensor, Elsewhere):
        return tensor
    return Sent.apply(tensor) if there else Fetched.apply(tensor)


class Devices(TorchFunctionMode):
    """Makes tensors on, and sends them to, the second device."""

    meta = False  # whether somebody asks for a tensor without numbers now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.type_as):
            return self._to(args[0], *args[1:], **kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return on(args[0], "cpu" if func is Tensor.cpu else CUDA)
        if func is torch.as_tensor and args and isinstance(args[0], Tensor):
            return self._to(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device) == HIDDEN:
            with patch.object(Devices, "meta", True):
                return func(*args, **kwargs)
        if device is not None:
            learns = bool(kwargs.pop("requires_grad", False))
            found = func(*unwrapped(args), **(unwrapped(kwargs) | {"device": "cpu"}))
            return (wrapped(found) if is_elsewhere(device) else found).requires_grad_(learns)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """`Tensor.to`: a device, a dtype, both, or another tensor's."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        found = tensor if device is None else on(tensor, device)
        if dtype is not None:
            found = found.to(dtype)
        if layout is not None:
            found = found.contiguous(memory_format=layout)
        return found.clone() if copy and found is tensor else found


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """A scope in which "cuda" can be used, and what there is on it, on a machine without one."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters' identity
    run = torch.autograd._engine_run_backward

    def run_there(*args: Any, **kwargs: Any) -> Any:  # a mode rests in what calls it, which is torch's own
        with Devices():
            return run(*args, **kwargs)

    with ExitStack() as stack:
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        for place, name, value in (
            (torch.autograd, "_engine_run_backward", run_there),
            (torch.cuda, "get_rng_state", torch.get_rng_state),
            (torch.cuda, "set_rng_state", torch.set_rng_state),
            (torch.cuda, "current_device", lambda: 0),
        ):
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(Factories())
        stack.enter_context(Devices())
        yield CUDA
