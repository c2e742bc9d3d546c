"""Surroundings of a call: autocast around recurrences, and whether something follows the Python code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside an autocast region: states and solves stay float32 where the model around
    them is not. Devices without autocast (meta) need nothing."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap …) is under way: there are no values to decide by, and
    no gradients but its own."""
    return torch._C._are_functorch_transforms_active()


def attention_kernels() -> AbstractContextManager[object]:
    """Around scaled_dot_product_attention: plain products where derivatives go forward, which no fused kernel
    has; whatever is fastest elsewhere."""
    return sdpa_kernel(SDPBackend.MATH) if forward_mode() else nullcontext()


def traced() -> bool:
    """Whether Python code is followed, by torch.compile, torch.func or derivatives that go forward, which see
    more in plain operations than in what is arranged for speed."""
    transform = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transform or torch.compiler.is_compiling()


def forward_mode() -> bool:
    """Whether derivatives may go along forward (torch.func.jvp, torch.autograd.forward_ad): functions with a
    backward pass by hand have none, the operations that they replace do."""
    return forward_ad._current_level >= 0


def one_operator() -> bool:
    """Whether torch.compile follows the Python code and may take what is long as one operator: an exported
    program is to hold operations of torch alone, and transforms of torch.func have to see them."""
    return torch.compiler.is_compiling() and not (
        torch.compiler.is_exporting() or transformed() or forward_mode()
    )


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients within the implementation of an operator, where autograd is switched off twice."""
    keys = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in keys:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def has_values(x: Tensor) -> bool:
    """Whether a check may look at the numbers of x: they are there, and waiting for them costs nothing."""
    at_hand = x.device.type == "cpu" and x.numel() > 0
    return at_hand and not traced() and not torch.jit.is_tracing() and not isinstance(x, FakeTensor)
