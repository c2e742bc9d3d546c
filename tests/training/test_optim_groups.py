"""Which parameters decay, and the learning rate of each step against torch's own schedulers."""

import pytest
import torch
from torch import nn

from nested_learning.models import HopeForCausalLM, preset
from nested_learning.optimizers.recipe import decayed_names
from nested_learning.training.config import OptimConfig
from nested_learning.training.optim import build_optimizer, build_schedule, lr_factor


def test_decay_of_hope():
    with torch.device("meta"):
        model = HopeForCausalLM(preset("hope-tiny", num_hidden_layers=1))
    decayed = decayed_names(model)
    names = {name for name, _ in model.named_parameters()}
    spared = {name.removeprefix("model.").removeprefix("layers.0.") for name in names - decayed}
    assert "embed_tokens.weight" in spared
    assert {"mixer.initial.W1", "mixer.initial.W2", "norm.weight", "mixer_norm.weight"} <= spared
    assert all(
        name.endswith((".bias", "norm.weight", "W1", "W2")) for name in spared - {"embed_tokens.weight"}
    )
    assert {"model.layers.0.mixer.in_proj.weight", "model.layers.0.cms.blocks.0.up.weight"} <= decayed


def test_every_trained_parameter_is_in_one_group():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Embedding(4, 2), "c": nn.Linear(2, 2)})
    model["c"].weight.requires_grad_(False)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [p is model["a"].weight for p in groups[0]["params"]] == [True]
    assert {id(p) for p in groups[1]["params"]} == {
        id(p) for p in (model["a"].bias, model["b"].weight, model["c"].bias)
    }


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_equals_torchs(schedule):
    steps, warmup, lr = 30, 6, 0.5
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    torch_schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=0.1 * lr)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps - warmup)
    )
    factor = lr_factor(OptimConfig(schedule=schedule, warmup_steps=warmup), steps)
    assert [factor(step) for step in range(warmup)] == [(step + 1) / warmup for step in range(warmup)]
    for step in range(warmup, steps + 1):
        assert lr * factor(step) == pytest.approx(torch_schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        torch_schedule.step()


def test_schedule_drives_the_optimizer():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(lr=2.0))
    schedule = build_schedule(optimizer, OptimConfig(lr=2.0, schedule="linear", warmup_steps=2), 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.1])
