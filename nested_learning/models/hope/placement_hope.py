"""Where the parts of a model compute: with their weights, or where accelerate brings these when they run."""

from __future__ import annotations

import torch
from torch import nn

from nested_learning.models.hope.block_hope import HopeBlock


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; that of the first part which says one.

    Weights that accelerate keeps on disk or elsewhere (`device_map`, `cpu_offload`) are on the meta device
    until a hook brings them to where they are needed.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return next(module.parameters()).device


def devices_of_blocks(model: nn.Module) -> dict[str, torch.device]:
    """The device of each block of a Hope model, by its name in the names of its states ("layers.0.mixer")."""
    blocks = [part for part in model.modules() if isinstance(part, HopeBlock)]
    return {f"layers.{index}": device_of(block) for index, block in enumerate(blocks)}
