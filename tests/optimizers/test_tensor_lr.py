"""A learning rate given as a tensor, as compiled steps and captured graphs have it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nested_learning.optimizers import DeepMomentumGD, DeltaGD, MultiFrequency
from tests.optimizers.cases import CASES
from tests.optimizers.test_conformance import parameters, run, set_gradients

every = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


def lr_of(build):
    return build(parameters()).param_groups[0]["lr"]


def assert_close(params, others, atol=1e-12):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@every
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_acts_as_its_number(build, shape):
    lr = lr_of(build)
    rate = torch.full(shape, lr, dtype=torch.float64)
    params, others = parameters(), parameters()
    optimizer, reference = build(params, lr=rate, weight_decay=0.1), build(others, lr=lr, weight_decay=0.1)
    run(optimizer, params, 3)
    run(reference, others, 3)
    for given, expected in zip((rate, optimizer.param_groups[0]["lr"]), (lr, lr), strict=True):
        assert float(given) == expected
    rate.fill_(lr / 2)  # the tensor is read at every step
    reference.param_groups[0]["lr"] = lr / 2
    run(optimizer, params, 3, start=3)
    run(reference, others, 3, start=3)
    assert_close(params, others)
    assert [p.shape for p in params] == [p.shape for p in others]


@every
def test_half_precision_is_rounded_once(build):
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    lr = lr_of(build)
    run(build(params, lr=torch.tensor(lr), weight_decay=0.1), params, 2)
    run(build(others, lr=lr, weight_decay=0.1), others, 2)
    assert_close([p.detach().float() for p in params], [p.detach().float() for p in others], atol=0.05)
    assert all(p.dtype == torch.bfloat16 for p in params)


@every
def test_schedulers_and_checkpoints(build):
    lr = lr_of(build)
    params, others = parameters(), parameters()
    optimizer, reference = build(params, lr=torch.tensor(lr, dtype=torch.float64)), build(others, lr=lr)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, reference)]
    for step in range(4):
        for ps, o, schedule in zip((params, others), (optimizer, reference), schedules, strict=True):
            set_gradients(ps, step)
            o.step()
            schedule.step()
    assert_close(params, others)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(again, lr=torch.tensor(lr, dtype=torch.float64))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert float(other.param_groups[0]["lr"]) == lr / 4
    run(optimizer, params, 2, start=4)
    run(other, again, 2, start=4)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)


@every
@pytest.mark.parametrize("bad", [torch.tensor(-0.1), torch.tensor(float("nan")), torch.ones(2)], ids=str)
def test_bad_tensors_are_refused(build, bad):
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        build(parameters(), lr=bad)


def test_only_lr_may_be_a_tensor():
    with pytest.raises(ValueError, match="weight_decay must be"):
        CASES["m3"](parameters(), weight_decay=torch.tensor(0.1))


def test_delta_gd_solves_with_it():
    weights = []
    for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = DeltaGD(layer.parameters(), lr=lr).attach(layer)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 5)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    assert_close(weights[:1] * 2, weights[1:], atol=1e-6)


def test_the_step_that_is_differentiated():
    updated = []
    for lr in (0.1, torch.tensor([0.1], dtype=torch.float64)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        optimizer = DeepMomentumGD(model.parameters(), lr=lr, weight_decay=0.1)
        model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step(create_graph=True)
        updated.append([t.detach() for t in optimizer.updated_parameters(model).values()])
        assert_close(updated[-1], [p.detach() for p in model.parameters()])
    assert_close(*updated)


def test_groups_of_several_periods():
    params, others = parameters(), parameters()
    for ps, lr in ((params, torch.tensor(0.05, dtype=torch.float64)), (others, 0.05)):
        groups = [{"params": ps[:2]}, {"params": ps[2:], "period": 2}]
        run(MultiFrequency(groups, lambda g, lr=lr: torch.optim.SGD(g, lr=lr)), ps, 4)
    assert_close(params, others)


@pytest.mark.parametrize(
    "name",
    ["delta", pytest.param("adam", marks=pytest.mark.slow), pytest.param("m3", marks=pytest.mark.slow)],
)
def test_a_compiled_step_follows_it(name):
    """One compiled function for all rates: a number in its place would be compiled in."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    rate = torch.tensor(0.05)
    optimizer, reference = CASES[name](params, lr=rate), CASES[name](others, lr=0.05)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(4):
        set_gradients(params, step)
        set_gradients(others, step)
        compiled()
        reference.step()
        rate.mul_(0.5)
        reference.param_groups[0]["lr"] *= 0.5
    assert_close(params, others, atol=1e-5)
