"""Precisions in which a processor is slow, and what to do there."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_warned = False


def bfloat16_is_slow(device: torch.device | str) -> bool:
    """Whether the device is a CPU without instructions for bfloat16, where products take several times as
    long as in float32."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def loading_dtype(config: Any, device: torch.device | str) -> torch.dtype | str:
    """`dtype` for `from_pretrained`: that of the checkpoint, but float32 for bfloat16 where that is slow.

    Args:
        config: configuration of the saved model.
        device: where the model is to run.
    """
    slow = config.dtype in (torch.bfloat16, "bfloat16") and bfloat16_is_slow(device)
    return torch.float32 if slow else "auto"


def warn_of_slow_bfloat16(device: torch.device | str, remedy: str) -> None:
    """Warn, once per process, where bfloat16 is slow on the device.

    Args:
        remedy: what to change, such as "use dtype=torch.float32".
    """
    global _warned
    if _warned or not bfloat16_is_slow(device):
        return
    _warned = True
    warnings.warn(
        "this CPU has no instructions for bfloat16 (avx512_bf16, amx_bf16): products take several times as "
        f"long as in float32; {remedy}",
        RuntimeWarning,
        stacklevel=3,
    )
