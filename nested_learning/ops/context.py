"""Surroundings of a call: autocast around recurrences, and whether something follows the Python code."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def has_values(x: Tensor) -> bool:
    """Whether a check may look at the numbers of x: they are there, and waiting for them costs nothing."""
    at_hand = x.device.type == "cpu" and x.numel() > 0
    return at_hand and not traced() and not torch.jit.is_tracing() and not isinstance(x, FakeTensor)
