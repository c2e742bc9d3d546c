"""Copies of an optimizer go on bit by bit: deepcopy, pickle, and the checkpoints of torch.distributed.

What frameworks do to optimizers (accelerate, wrappers that average weights, Ray, FSDP2).
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nested_learning import optimizers as no
from tests.optimizers.cases import CASES


class Network(nn.Module):
    """Weights that share a shape, a convolution, a norm, and a linear map whose forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.conv, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))) + self.conv(x)
        return self.attention(h, h, h, need_weights=False)[0]


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def in_two_groups(params):
    params = list(params)
    return [{"params": params[:2], "period": 2}, {"params": params[2:], "period": 3}]


def given(params):
    params = list(params)
    return no.PreconditionedMomentum(
        params, lr=0.02, preconditioner="learned", given={params[0]: torch.eye(6)}
    )


def gradients_doubled(g):
    return 2 * g


BUILDS = {
    **{name: build for name, build in CASES.items() if name != "delta-gd"},
    "given": given,
    "delta-gd": lambda params: no.DeltaGD(params, lr=0.02),
    "dmgd-value": lambda params: no.DeepMomentumGD(params, objective="l2", value=gradients_doubled),
    "periods-adamw": lambda params: no.MultiFrequency(
        in_two_groups(params), lambda groups: torch.optim.AdamW(groups, lr=0.01)
    ),
    "periods-sgd": lambda params: no.MultiFrequency(
        in_two_groups(params), lambda groups: torch.optim.SGD(groups, lr=0.01), reduction="mean"
    ),
    "periods-dmgd": lambda params: no.MultiFrequency(
        in_two_groups(params), lambda groups: no.DeepMomentumGD(groups, lr=0.01)
    ),
    "periods-delta-gd": lambda params: no.MultiFrequency(
        in_two_groups(params), lambda groups: no.DeltaGD(groups, lr=0.02)
    ),
}
every = pytest.mark.parametrize("name", BUILDS)


def collector(optimizer):
    """The optimizer that collects inputs of layers: this one, the one inside, or none."""
    found = getattr(optimizer, "inner", optimizer)
    return found if isinstance(found, no.DeltaGD) else None


def optimizer_of(name, model):
    optimizer = BUILDS[name](model.parameters())
    if (delta := collector(optimizer)) is not None:
        delta.attach(model)
    return optimizer


def train(model, optimizer, steps, schedule=None):
    for step in steps:
        x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def trained(name, steps=5):
    model = network()
    optimizer = optimizer_of(name, model)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_same_future(one, other):
    for model, optimizer in (one, other):
        train(model, optimizer, range(5, 10))
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@every
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_goes_on_bit_by_bit(name, way):
    model, optimizer = trained(name)
    optimizer.skipped_steps = 7
    twin, other = way((model, optimizer))
    assert type(other) is type(optimizer)
    assert other.skipped_steps == 7
    assert {id(p) for group in other.param_groups for p in group["params"]} == {
        id(p) for p in twin.parameters()
    }
    if (delta := collector(other)) is not None:
        twin(torch.zeros(1, 2, 6)).sum().backward()
        with pytest.raises(ValueError, match="A copy is not attached"):
            other.step()
        delta.attach(twin)
    assert_same_future((model, optimizer), (twin, other))


def two_inside(groups):
    first, *others = groups[0]["params"]  # of the first group, with which the inner optimizer is made
    return no.NestedOptimizer([torch.optim.NAdam([first], lr=0.01), torch.optim.AdamW(others, lr=0.01)])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "inner",
    [
        *(lambda groups, cls=cls: cls(groups, lr=0.01) for cls in (torch.optim.Adam, torch.optim.RMSprop)),
        *(lambda groups, cls=cls: cls(groups, lr=0.01) for cls in (torch.optim.ASGD, no.DeepMomentumGD)),
        two_inside,
    ],
    ids=["adam", "rmsprop", "asgd", "dmgd", "nested"],
)
def test_a_copy_before_the_first_step_of_a_group(inner, way, steps):
    model = network()
    optimizer = no.MultiFrequency(in_two_groups(model.parameters()), inner)
    train(model, optimizer, range(steps))  # the groups step at the second and at the third
    before = str(optimizer.state_dict())
    twin, other = way((model, optimizer))
    assert str(other.state_dict()) == before == str(optimizer.state_dict())
    assert_same_future((model, optimizer), (twin, other))


@pytest.mark.parametrize("name", ["m3", "delta-gd", "periods-adamw"])
def test_a_copy_with_its_scheduler(name):
    model, optimizer = trained(name, 0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, range(3), schedule)
    twin, other, its_schedule = copy.deepcopy((model, optimizer, schedule))
    if isinstance(other, no.DeltaGD):
        other.attach(twin)
    train(model, optimizer, range(3, 6), schedule)
    train(twin, other, range(3, 6), its_schedule)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_copy_takes_groups_and_leaves_the_original_alone():
    model, optimizer = trained("periods-adamw")
    before = str(optimizer.state_dict())
    twin, other = copy.deepcopy((model, optimizer))
    assert other.param_groups is other.inner.param_groups
    assert other.state is other.inner.state
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))], "period": 4})
    train(twin, other, range(3))
    assert str(optimizer.state_dict()) == before


def test_the_graph_of_a_step_is_not_copied():
    model, optimizer = trained("dmgd")
    optimizer.step(create_graph=True)
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match="create_graph=True"):
        other.updated_parameters(twin)
    optimizer.updated_parameters(model)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_of_an_attached_model_is_not_attached_and_works(way):
    model, optimizer = trained("delta-gd")
    twin = way(model)
    x = torch.ones(1, 2, 6)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert not optimizer._moments
    another = no.DeltaGD(twin.parameters(), lr=0.02).attach(twin)
    another.load_state_dict(optimizer.state_dict())
    assert_same_future((model, optimizer), (twin, another))


def test_hooks_of_an_unpickled_model_keep_their_numbers(monkeypatch):
    """In a new process torch counts hooks from zero; one of the same number would get the copy's keywords."""
    model, optimizer = trained("delta-gd", 0)
    stored = pickle.dumps(model)
    optimizer.detach()
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    twin = pickle.loads(stored)
    seen = []
    for layer in twin.modules():
        layer.register_forward_hook(lambda layer, args, output: seen.append(layer))
    twin(torch.ones(1, 2, 6))
    assert twin.first in seen


FLAT = {"flatten_optimizer_state_dict": True}
FULL = {"full_state_dict": True, "cpu_offload": True}


@every
@pytest.mark.parametrize(
    ("options", "through_files", "steps"),
    [
        pytest.param({}, True, 5, id="files"),
        pytest.param(FLAT, False, 6, id="flat"),
        pytest.param({}, False, 6, id="plain", marks=pytest.mark.slow),
        pytest.param(FLAT, True, 5, id="flat-files", marks=pytest.mark.slow),
        pytest.param(FULL, False, 5, id="full", marks=pytest.mark.slow),
    ],
)
def test_distributed_checkpoints_resume_bit_by_bit(name, options, through_files, steps, tmp_path):
    """Five steps end within the periods of 2 and 3, six with both."""
    options = StateDictOptions(**options)
    model, optimizer = trained(name, steps)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = optimizer_of(name, twin)
    if through_files:
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
        found = {"optimizer": get_optimizer_state_dict(twin, other, options=options)}
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
        saved = found["optimizer"]
    set_optimizer_state_dict(twin, other, saved, options=options)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):  # the probe moved nothing
        assert torch.equal(p, q)
    assert_same_future((model, optimizer), (twin, other))


def test_a_file_of_lists_and_of_two_states_loads(tmp_path):
    """What DeepMomentumGD and MultiFrequency saved up to version 0.1: lists, and the inner state apart."""
    model, optimizer = trained("dmgd")
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("step")
        for name in ("weights", "initial"):
            if name in state:
                state[name] = list(state[name].values())
    saved["state"] = {i: state for i, state in saved["state"].items() if state}
    twin = copy.deepcopy(model)
    other = optimizer_of("dmgd", twin)
    other.load_state_dict(saved)
    train(model, optimizer, range(5, 8))
    train(twin, other, range(5, 8))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)

    model, optimizer = trained("periods-adamw")
    saved = copy.deepcopy(optimizer.state_dict())
    inner = {"state": {}, "param_groups": copy.deepcopy(saved["param_groups"])}
    for i, state in saved["state"].items():
        inner["state"][i] = {k: v for k, v in state.items() if k not in ("accumulated", "gradients")}
        waiting = {"accumulated": state["accumulated"]} if state["gradients"] else {}
        saved["state"][i] = waiting
    saved = {**saved, "inner": inner, "state": {i: s for i, s in saved["state"].items() if s}}
    twin = copy.deepcopy(model)
    other = optimizer_of("periods-adamw", twin)
    other.load_state_dict(saved)
    train(model, optimizer, range(5, 12))
    train(twin, other, range(5, 12))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
