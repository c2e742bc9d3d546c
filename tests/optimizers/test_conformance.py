"""The contract of every optimizer of the package, whatever its rule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.optimizers.cases import CASES

every = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    """Shapes of all kinds: wide, tall, a second wide one, a bias, a scalar and a convolution."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(4, 6), (5, 3), (4, 6), (6,), (), (4, 2, 3, 3)]
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params: list[nn.Parameter], step: int, sign: float = 1.0) -> None:
    """Gradients of a quadratic with its own minimum per parameter, plus noise that depends on the step."""
    g = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        p.grad = sign * (p.detach().double() - 0.1 * i + 0.3 * noise).to(p.dtype)


def run(optimizer, params, steps, start=0, sign=1.0):
    for step in range(start, start + steps):
        set_gradients(params, step, sign)
        optimizer.step()


def clones(params):
    return [p.detach().clone() for p in params]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_converges_on_a_quadratic(name):
    params, build = parameters(), CASES[name]
    # the printed M3 sums all gradients and never forgets one: it swings around the minimum
    tolerance = 0.1 if name == "m3-paper" else 1e-2
    steps = 300 if name.startswith(("orthogonal", "m3")) else 150  # those move each entry by a step's length
    optimizer = build(params)
    distance = lambda: sum(float(((p.detach() - 0.5) ** 2).sum()) for p in params)  # noqa: E731
    start = distance()
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * (1 - step / steps)
        for p in params:
            p.grad = p.detach() - 0.5
        optimizer.step()
    assert distance() < tolerance * start


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_by_bit(build, dtype):
    params = parameters(dtype)
    optimizer = build(params, weight_decay=0.01)
    run(optimizer, params, 5)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(copies)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 6, start=5)
    run(other, copies, 6, start=5)
    assert_equal(params, copies)


@every
def test_a_state_survives_torch_save_with_weights_only(build, tmp_path):
    params = parameters(torch.float32)
    optimizer = build(params)
    run(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(copies)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(optimizer, params, 2, start=3)
    run(other, copies, 2, start=3)
    assert_equal(params, copies)


@every
def test_loading_twice_and_adding_a_group_after_it(build):
    params = parameters()
    optimizer = build(params[:3])
    run(optimizer, params[:3], 2)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": params[3:]})
    run(optimizer, params, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == 0


@every
def test_loading_copies_the_state(build):
    params, copies = parameters(), parameters()
    optimizer, other = build(params), build(copies)
    run(optimizer, params, 3)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    run(other, copies, 3, start=3)
    after = optimizer.state_dict()["state"]
    assert str(before) == str(after)


@every
def test_hooks_of_users_have_their_say_in_loading(build):
    """What one makes of a state_dict is loaded, and what one does afterwards stays."""
    params = parameters()
    optimizer = build(params)
    run(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, found: {**found, "state": {}})
    optimizer.load_state_dict(saved)
    assert not any(optimizer.state.values())
    hook.remove()
    states = lambda found: str(sorted(found["state"].items()))  # noqa: E731
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda each: seen.append(states(each.state_dict())))
    optimizer.load_state_dict(saved)
    assert seen == [states(saved)]


@every
def test_half_precision_keeps_its_state_in_float32(build):
    params = parameters(torch.bfloat16)
    optimizer = build(params)
    run(optimizer, params, 2)
    leaves = torch.utils._pytree.tree_leaves([dict(s) for s in optimizer.state.values()])
    assert {t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()} <= {
        torch.float32
    }
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in params)


@every
def test_maximize_is_descent_on_the_negated_gradient(build):
    up, down = parameters(), parameters()
    run(build(up, maximize=True), up, 4, sign=-1.0)
    run(build(down), down, 4)
    assert_equal(up, down)


@every
def test_weight_decay_is_decoupled(build):
    """Without gradients, three steps leave W (1 − lr·wd)³ and nothing else."""
    params = parameters()
    start = clones(params)
    optimizer = build(params, weight_decay=0.5)
    lr = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, s in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), s * (1 - lr * 0.5) ** 3, rtol=1e-12, atol=1e-12)


@every
def test_a_step_in_half_precision_is_rounded_once(build):
    """Decay and step of bfloat16 weights happen in float32: bfloat16 alone would lose 1 − 1e-3."""
    half = parameters(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in half]
    for params in (half, exact):
        optimizer = build(params, lr=2e-3, weight_decay=0.5)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_equal(half, [p.to(torch.bfloat16) for p in exact])


@every
def test_schedulers_set_the_step(build):
    params = parameters()
    optimizer = build(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for step in range(4):
        set_gradients(params, step)
        before = clones(params)
        optimizer.step()
        schedule.step()
        moved = any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert moved == (step < 2)


@every
def test_groups_that_a_scheduler_has_used_make_another_optimizer(build):
    optimizer = build(parameters())
    cycles = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=cycles)
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    schedule.step()
    again = build([dict(group) for group in optimizer.param_groups])
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


@every
def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned(build):
    params, copies = parameters(), parameters()
    optimizer, other = build(params), build(copies)

    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params) / 2
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    for p in copies:
        p.grad = p.detach().clone()
    other.step()
    assert float(loss.detach()) == pytest.approx(
        sum(float((p.detach() ** 2).sum()) for p in parameters()) / 2
    )
    assert_equal(params, copies)


@every
def test_the_gradient_is_left_as_it_was(build):
    params = parameters()
    optimizer = build(params, weight_decay=0.1)
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_equal([p.grad for p in params], before)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_gradient_skips_the_step_and_is_counted(build, bad):
    params, copies = parameters(), parameters()
    optimizer, other = build(params), build(copies)
    run(optimizer, params, 2)
    run(other, copies, 2)
    set_gradients(params, 2)
    params[1].grad.view(-1)[0] = bad
    before = clones(params)
    optimizer.step()
    assert_equal(params, before)
    assert optimizer.skipped_steps == 1
    run(optimizer, params, 3, start=3)
    run(other, copies, 3, start=3)
    assert_equal(params, copies)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert other.skipped_steps == 1


@every
def test_error_if_nonfinite_names_the_parameter(build):
    params = parameters()
    optimizer = build(params, error_if_nonfinite=True)
    set_gradients(params, 0)
    params[1].grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"parameter 1 of group 0, shape \(5, 3\)"):
        optimizer.step()
    assert_equal(params, parameters())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("delta-paper", "feature-paper")])
def test_huge_but_finite_gradients_neither_skip_nor_break(name):
    """Squares of 1e30 overflow float32. (The two printed forms with a power of g do overflow.)"""
    params = [nn.Parameter(torch.zeros(2, 3))]
    optimizer = CASES[name](params)
    params[0].grad = torch.full((2, 3), 1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert params[0].isfinite().all()


@every
def test_parameters_without_gradient_stay_and_may_come_later(build):
    params = parameters()
    optimizer = build(params[:3])
    run(optimizer, params[:2], 2)
    assert torch.equal(params[2], parameters()[2])
    optimizer.add_param_group({"params": params[3:], "lr": 0.0})
    before = clones(params)
    run(optimizer, params, 2)
    assert_equal(params[3:], before[3:])
    assert all(not torch.equal(p, b) for p, b in zip(params[:3], before[:3], strict=True))


@every
def test_grad_scaler_unscales_and_skips(build):
    params, copies = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = build(params), build(copies)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(copies, step)
        scaler.scale(torch.ones(()))  # creates the scale; the gradients carry it below
        for p in params:
            p.grad = p.grad * 1024.0
        if step == 1:
            params[0].grad.view(-1)[0] = math.inf
            scaler.step(optimizer)
            scaler.update(1024.0)
            continue
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert_equal(params, copies)


@every
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "0.1", True])
def test_bad_hyperparameters_are_refused(build, name, bad):
    with pytest.raises(ValueError, match=rf"{name} must be .*got {bad!r}"):
        build(parameters(), **{name: bad})
    with pytest.raises(ValueError, match=rf"{name} must be .*got {bad!r}"):
        build([{"params": parameters(), name: bad}])


@every
def test_every_option_has_a_default_and_a_check(build):
    optimizer = build(parameters())
    inner = set(optimizer.inner.defaults) if hasattr(optimizer, "inner") else set()
    assert set(optimizer.options) == set(optimizer.defaults) - inner
    for name, check in optimizer.options.items():
        assert check.check(name, optimizer.defaults[name]) == optimizer.defaults[name]
        with pytest.raises(ValueError, match=f"^{name} must be .*; got |^{name} must be .*, got "):
            check.check(name, object())


@every
def test_a_misspelt_option_of_a_group_is_refused(build):
    with pytest.raises(ValueError, match="Did you mean 'weight_decay'"):
        build([{"params": parameters(), "weight_decy": 0.1}])


@every
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_and_complex_are_refused(build):
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = build([p])
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2))
    with pytest.raises(ValueError, match=r"sparse one for a parameter of shape \(3, 2\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex64"):
        build([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@every
def test_a_foreign_state_dict_is_refused_and_nothing_is_loaded(build):
    params = parameters()
    optimizer = build(params)
    run(optimizer, params, 2)
    before = str(optimizer.state_dict())
    adam = torch.optim.RMSprop(params)
    adam.step()
    state = {k: v for k, v in optimizer.state_dict().items() if k != "optimizer"}
    foreign = {
        "does not belong to|another": adam.state_dict(),
        "saved by Other": {**optimizer.state_dict(), "optimizer": {"name": "Other"}},
        "missing": {"state": {}},
        "another model": build_and_save(build, [nn.Parameter(torch.ones((*p.shape, 2))) for p in params]),
        "same groups": build_and_save(build, params[:2]),
    }
    for message, saved in foreign.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before
    optimizer.load_state_dict(state)  # as torch.distributed.checkpoint passes it, without our header


def build_and_save(build, params):
    optimizer = build([nn.Parameter(p.detach().clone()) for p in params])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()
