"""A group of period K equals the inner optimizer on the reduced gradients of K steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nested_learning.optimizers import (
    AdamMemory,
    DeltaGD,
    DeltaMomentum,
    MemoryOptimizer,
    MultiFrequency,
    NestedOptimizer,
)

INNERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "delta": lambda groups: DeltaMomentum(groups, lr=0.1),
    "memory": lambda groups: MemoryOptimizer(groups, AdamMemory(), lr=0.1),
}
inners = pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())


def grads(steps, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 3, 4, generator=g, dtype=torch.float64)


def weight(dtype=torch.float64):
    return nn.Parameter(torch.ones(3, 4, dtype=dtype))


def feed(optimizer, pairs, steps):
    for step in steps:
        for p, g in pairs:
            p.grad = g[step].to(p.dtype)
        optimizer.step()


@inners
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_three_periods_equal_three_loops_over_blocks(inner, reduction):
    params, gradients = [weight() for _ in range(3)], [grads(12, i) for i in range(3)]
    periods = (1, 2, 5)
    groups = [{"params": [p], "period": k} for p, k in zip(params, periods, strict=True)]
    feed(
        MultiFrequency(groups, inner, reduction=reduction),
        list(zip(params, gradients, strict=True)),
        range(12),
    )
    for p, g, k in zip(params, gradients, periods, strict=True):
        alone = weight()
        optimizer = inner([alone])
        for block in range(12 // k):
            total = g[block * k : (block + 1) * k].sum(0)
            alone.grad = total / k if reduction == "mean" else total
            optimizer.step()
        torch.testing.assert_close(p, alone, rtol=0, atol=1e-12)


@inners
def test_between_its_steps_a_group_does_not_move(inner):
    p, g = weight(), grads(6, 0)
    optimizer = MultiFrequency([p], inner, period=3)
    moved = []
    for step in range(6):
        before = p.detach().clone()
        feed(optimizer, [(p, g)], [step])
        moved.append(not torch.equal(p, before))
        assert torch.equal(p.grad, g[step])
    assert moved == [False, False, True, False, False, True]


@inners
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_checkpoint_in_the_middle_of_a_block_continues_bit_by_bit(inner, dtype):
    fast, slow, g = weight(dtype), weight(dtype), grads(10, 0)
    optimizer = MultiFrequency([{"params": [fast]}, {"params": [slow], "period": 4}], inner)
    feed(optimizer, [(fast, g), (slow, g)], range(6))
    fast2, slow2 = (nn.Parameter(p.detach().clone()) for p in (fast, slow))
    other = MultiFrequency([{"params": [fast2]}, {"params": [slow2], "period": 4}], inner)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed(optimizer, [(fast, g), (slow, g)], range(6, 10))
    feed(other, [(fast2, g), (slow2, g)], range(6, 10))
    assert torch.equal(fast, fast2)
    assert torch.equal(slow, slow2)
    assert other.param_groups is other.inner.param_groups


def test_a_schedule_reaches_the_inner_optimizer_also_after_loading():
    p = weight()
    optimizer = MultiFrequency([p], INNERS["sgd"])
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    feed(optimizer, [(p, grads(1, 0))], [0])
    schedule.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.05


def test_a_nonfinite_gradient_counts_for_no_group():
    p, g = weight(), grads(5, 0)
    clean = weight()
    broken = torch.cat([g[:1], torch.full((1, 3, 4), float("nan")).double(), g[1:]])
    optimizer = MultiFrequency([p], INNERS["sgd"], period=5)
    feed(optimizer, [(p, broken)], range(6))
    feed(MultiFrequency([clean], INNERS["sgd"], period=5), [(clean, g)], range(5))
    assert torch.equal(p, clean)
    assert optimizer.skipped_steps == 1


def test_a_group_added_later_starts_its_own_count():
    first, later, g = weight(), weight(), grads(6, 0)
    optimizer = MultiFrequency([first], INNERS["sgd"], period=4)
    feed(optimizer, [(first, g)], range(2))
    optimizer.add_param_group({"params": [later], "period": 3, "lr": 0.2})
    feed(optimizer, [(first, g), (later, g)], range(2, 5))
    torch.testing.assert_close(later.detach(), 1 - 0.2 * g[2:5].sum(0), rtol=0, atol=1e-12)


def test_errors():
    p = weight()
    with pytest.raises(ValueError, match="period must be a finite whole number >= 1, got 0"):
        MultiFrequency([p], INNERS["sgd"], period=0)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        MultiFrequency([p], INNERS["sgd"], reduction="max")
    with pytest.raises(ValueError, match="made list"):
        MultiFrequency([p], list)
    with pytest.raises(ValueError, match=r"MultiFrequency takes .*LBFGS needs closure at every step"):
        MultiFrequency([p], lambda groups: torch.optim.LBFGS(groups[0]["params"]))
    with pytest.raises(ValueError, match=r"load it into `\.inner`"):
        MultiFrequency([p], INNERS["sgd"]).load_state_dict(INNERS["sgd"]([p]).state_dict())
    with pytest.raises(ValueError, match=r"saved by MultiFrequency\(SGD, 'sum'\)"):
        MultiFrequency([p], INNERS["adamw"]).load_state_dict(MultiFrequency([p], INNERS["sgd"]).state_dict())


@inners
def test_an_option_that_nobody_knows_is_refused(inner):
    fast, slow = weight(), weight()
    with pytest.raises(ValueError, match=r"parameter group.* 'perid'\. Did you mean 'period'|group: 'perid'"):
        MultiFrequency([{"params": [fast]}, {"params": [slow], "perid": 16}], inner)
    with pytest.raises(ValueError, match="'perid'"):
        MultiFrequency([{"params": [slow], "perid": 16}], inner)
    optimizer = MultiFrequency([fast], inner)
    with pytest.raises(ValueError, match=r"'weight_decy'\. Did you mean 'weight_decay'"):
        optimizer.add_param_group({"params": [slow], "weight_decy": 0.1})
    assert [group["params"] for group in optimizer.param_groups] == [[fast]]
    optimizer.add_param_group({"params": slow, "period": 2, "name": "slow", "initial_lr": 0.1, "lr": 0.1})
    assert optimizer.param_groups[1]["name"] == "slow"


@inners
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_not_real_are_refused(inner, dtype):
    p, wrong = weight(), torch.ones(3, dtype=dtype)
    words = f"trains real floating-point parameters, got one of {dtype} with shape"
    for params in (
        wrong,
        [wrong],
        [("named", wrong)],
        [{"params": [p]}, {"params": (each for each in [wrong])}],
    ):
        with pytest.raises(ValueError, match=words):
            MultiFrequency([params] if params is wrong else params, inner)
    optimizer = MultiFrequency([p], inner)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("form", ["one", "list", "generator", "named", "view"])
def test_parameters_in_any_form_that_the_inner_optimizer_takes(form):
    first, p = weight(), weight()
    forms = {"one": p, "list": [p], "generator": (each for each in [p]), "named": [("p", p)]}
    given = {"p": p}.values() if form == "view" else forms[form]
    other = [("first", first)] if form == "named" else [first]
    optimizer = MultiFrequency(other, INNERS["sgd"])
    optimizer.add_param_group({"params": given, "period": 2})
    assert [group["params"] for group in optimizer.param_groups] == [[first], [p]]
    assert optimizer.param_groups[1]["period"] == 2


def test_a_group_that_is_refused_leaves_nothing_behind():
    first, second, wrong = weight(), weight(), torch.ones(3, dtype=torch.complex64)
    nested = NestedOptimizer([torch.optim.SGD([first], lr=0.1), torch.optim.AdamW([second])])
    for inner in (nested, torch.optim.AdamW([first, second])):
        optimizer = MultiFrequency([first, second], lambda _, inner=inner: inner)
        groups = list(optimizer.param_groups)
        for params in (wrong, [wrong], (each for each in [wrong]), iter([weight(), wrong])):
            with pytest.raises(ValueError, match=r"trains real floating-point parameters, got one of"):
                optimizer.add_param_group({"params": params})
        assert optimizer.param_groups == groups
        optimizer.add_param_group({"params": weight(), "period": 3})
        assert [group["period"] for group in optimizer.param_groups] == [1] * len(groups) + [3]


@inners
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("period", "blocks"), [(2, [3, 2, 2]), (1, [3, 1, 1, 1, 1]), (6, [6, 6])])
def test_a_period_that_is_changed_in_the_middle_of_a_block(inner, reduction, period, blocks):
    p, alone, g = weight(), weight(), grads(12, 0)
    optimizer, reference = MultiFrequency([p], inner, period=4, reduction=reduction), inner([alone])
    feed(optimizer, [(p, g)], range(2))
    optimizer.param_groups[0]["period"] = period
    feed(optimizer, [(p, g)], range(2, sum(blocks)))
    for part in g[: sum(blocks)].split(blocks):
        alone.grad = part.sum(0) if reduction == "sum" else part.mean(0)
        reference.step()
    torch.testing.assert_close(p, alone, rtol=0, atol=1e-12)
    assert ("accumulated" in optimizer.state[p]) == (period > 1)


def test_a_period_of_one_after_the_end_of_a_block():
    p, g = weight(), grads(5, 0)
    optimizer = MultiFrequency([p], INNERS["memory"], period=2)
    feed(optimizer, [(p, g)], range(2))
    optimizer.param_groups[0]["period"] = 1
    feed(optimizer, [(p, g)], range(2, 5))
    assert set(optimizer.state[p]) == {"mean", "square", "step"}


def test_a_step_that_the_inner_optimizer_refuses_changes_nothing():
    layers = [nn.Linear(4, 3, bias=False).double() for _ in range(2)]
    g = grads(2, 0)
    optimizers = [
        MultiFrequency(
            [{"params": layer.weight}], lambda groups: DeltaGD(groups, lr=0.1, inner="gd"), period=2
        )
        for layer in layers
    ]
    with torch.no_grad():
        layers[1].weight.copy_(layers[0].weight)
    optimizers[1].inner.attach(layers[1])
    for step in range(2):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = g[step].clone()
            before = copy.deepcopy(optimizer.state_dict())
            if optimizer is optimizers[0] and step == 1:
                with pytest.raises(ValueError, match="call attach"):
                    optimizer.step()
                after = optimizer.state_dict()
                torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
                assert after["param_groups"] == before["param_groups"]
                assert torch.equal(layer.weight.grad, g[step])
                optimizer.inner.attach(layer)
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


@inners
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_beyond_the_dtype_skip_the_step_and_begin_a_new_block(inner, reduction):
    p, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = MultiFrequency([p], inner, period=2, reduction=reduction)
    twin = MultiFrequency([other], inner, period=2, reduction=reduction)
    for size in (3e38, 3e38):
        p.grad = torch.full((3,), size)
        optimizer.step()
    assert (optimizer.skipped_steps, p.detach().tolist()) == (1, [0.0] * 3)
    for size in (1.0, 2.0):
        p.grad, other.grad = torch.full((3,), size), torch.full((3,), size)
        optimizer.step()
        twin.step()
    assert torch.equal(p, other)
    assert p.detach().abs().min() > 0
    strict = MultiFrequency([p], inner, period=2, reduction=reduction, error_if_nonfinite=True)
    p.grad = torch.full((3,), 3e38)
    strict.step()
    with pytest.raises(FloatingPointError, match="parameter 0 of group 0"):
        strict.step()


def test_a_momentum_is_cycled_as_by_the_inner_optimizer():
    p, other = weight(), weight()
    optimizer, inner = MultiFrequency([p], INNERS["adamw"], period=2), INNERS["adamw"]([other])
    for each in (optimizer, inner):
        torch.optim.lr_scheduler.OneCycleLR(each, 0.1, total_steps=9)
    assert optimizer.param_groups[0]["betas"] == inner.param_groups[0]["betas"]
    assert optimizer.param_groups[0]["betas"][0] == 0.95


@pytest.mark.parametrize(
    ("dtype", "size", "count"),
    [
        (torch.float32, 1e3, 4),
        (torch.float32, 1e25, 4),
        (torch.float32, 3e38, 1000),
        (torch.float64, 1e200, 4),
        (torch.float16, 3e3, 1000),
    ],
)
def test_gradients_of_any_size_are_clipped_to_the_norm(dtype, size, count):
    weight = nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = MultiFrequency(
        [weight], inner=lambda group: torch.optim.SGD(group, lr=1.0), max_grad_norm=1.0
    )
    weight.grad = torch.full_like(weight, size)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full_like(weight, -(count**-0.5)), rtol=2e-3, atol=0)


# Inputs that DeltaGD collects beside gradients --------------------------------------------------------------


def delta_gd(groups):
    return DeltaGD(groups, lr=0.1)


def test_a_copy_in_a_period_has_the_inputs_that_wait():
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = MultiFrequency(model.parameters(), delta_gd, period=2)
    optimizer.inner.attach(model)
    first, second = torch.randn(2, 4, 3, dtype=torch.float64)
    model(first).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    twin, other = copy.deepcopy((model, optimizer))
    other.inner.attach(twin)
    for each, own in ((model, optimizer), (twin, other)):
        each(second).square().mean().backward()
        own.step()
    assert torch.equal(model.weight, twin.weight)


def test_inputs_go_with_the_sum_that_is_dropped_and_no_others():
    """The first block of `fast` takes no step; its twin has none, and `slow` all inputs in both."""
    model = nn.ModuleDict({"fast": nn.Linear(3, 2, bias=False), "slow": nn.Linear(3, 2, bias=False)})
    twin, x = copy.deepcopy(model), torch.randn(4, 6, 3)
    for each in (model, twin):
        fast, slow = each["fast"], each["slow"]
        groups = [{"params": [fast.weight], "period": 2}, {"params": [slow.weight], "period": 4}]
        optimizer = MultiFrequency(groups, delta_gd)
        optimizer.inner.attach(each)
        for number, rows in enumerate(x):
            slow(rows).square().mean().backward()
            if number >= 2 or each is model:
                fast(rows).square().mean().backward()
            if number < 2 and each is model:
                fast.weight.grad.fill_(3e38)  # two of these are beyond float32
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == (each is model)
    for name in ("fast", "slow"):
        assert torch.equal(model[name].weight, twin[name].weight), name


def test_a_step_that_is_refused_takes_no_inputs_that_wait():
    """Those of the refused gradient alone are gone with it, as where there never was one."""
    model = nn.Linear(3, 2, bias=False)
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 3)
    for each in (model, twin):
        inner = lambda groups: DeltaGD(groups, lr=0.1, error_if_nonfinite=True)  # noqa: E731
        optimizer = MultiFrequency(each.parameters(), inner, period=2)
        optimizer.inner.attach(each)
        for rows in (x[0], 1e30 * x[1], x[1]):
            if each is twin and rows.abs().max() > 1e20:
                continue
            each(rows).square().mean().backward()
            if rows.abs().max() > 1e20:
                each.weight.grad.fill_(1.0)  # finite, as the inputs are, whose squares are not
                with pytest.raises(FloatingPointError, match="inputs of a layer"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.weight, twin.weight)


def test_inputs_wait_however_deep_the_optimizer_lies_that_collects_them():
    def trained(inner):
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False).double()
        optimizer = MultiFrequency(model.parameters(), inner, period=2)
        [collector] = (
            optimizer.inner.ours() if isinstance(optimizer.inner, NestedOptimizer) else [optimizer.inner]
        )
        collector.attach(model)
        for rows in torch.randn(4, 5, 3, dtype=torch.float64):
            model(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight

    alone = trained(delta_gd)
    for inner in (
        lambda groups: NestedOptimizer([delta_gd(groups)]),
        lambda groups: NestedOptimizer([NestedOptimizer([delta_gd(groups)])]),
    ):
        assert torch.equal(trained(inner), alone)
