"""The code in docs/optimizers.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from nested_learning import HopeForCausalLM, optimizers
from nested_learning.models import preset

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def test_every_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 9
    x, y = torch.ones(4, 3), torch.ones(4, 2)
    given = {
        "model": nn.Linear(3, 2),
        "loss_fn": nn.functional.mse_loss,
        "batches": [(x, y)] * 2,
        "x": x,
        "y": y,
        "x_val": -x,
        "y_val": y,
        "weight": torch.ones(3),
        "gradients": [torch.ones(3)] * 3,
        "fast": [nn.Parameter(torch.ones(2))],
        "slow": [nn.Parameter(torch.ones(2))],
        "torch": torch,
        "build": optimizers.build,
        "hope": HopeForCausalLM(preset("hope-tiny", num_hidden_layers=1)),
        "DeepMomentumGD": optimizers.DeepMomentumGD,
    }
    for block in blocks:
        exec(block, dict(given))
