"""The process that runs, alone or as one of several."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """accelerate's state of this process: device, index, number of processes.

    accelerate joins processes on CPUs only where it is told that they are on CPUs; a plain `PartialState()`
    takes each of them for the main and only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
