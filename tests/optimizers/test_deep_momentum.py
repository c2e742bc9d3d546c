"""Eq 50 against a loop over one matrix, its meta-gradient against finite differences, its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nested_learning.ops import newton_schulz
from nested_learning.optimizers import DeepMomentumGD
from nested_learning.optimizers.arithmetic import tensor_bytes

SHAPES = [(16, 5), (5, 16), (6,), (16, 2, 3)]
OPTIONS = {"lr": 0.1, "memory_lr": 0.05, "momentum": 0.8, "hidden_size": 3}


def gradients(shape, steps=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=g, dtype=torch.float64)


def train(optimizer, params, steps=5, **options):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, steps, i)[step].to(p.dtype)
        optimizer.step(**options)


def weights_of(shapes, dtype=torch.float64):
    return [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]


def plain_objective(name, answer, value, previous):
    if name == "dot":
        return -(answer * value).sum() / value.numel()
    if name == "l2":
        return ((answer - value) ** 2).sum() / (2 * value.numel())
    cosines, sizes = [], []
    for a, v in zip(answer, value, strict=True):
        cosines.append(1 - a @ v / (a.norm() * v.norm()))
        sizes.append((a.norm() / v.norm() - 1) ** 2)
    loss = (sum(cosines) + sum(sizes)) / len(value)
    if previous is not None:
        mean = answer.sum(0) / len(answer)
        loss = loss + 1 - mean @ previous / (mean.norm() * previous.norm())
    return loss


def reference(start, grads, theta0, objective, factors=1, value=None):
    """W ← W − lr m(u), θ ← θ₀ + α(θ − θ₀) − memory_lr ∇L, written out for one matrix."""
    W, theta, previous = start.clone(), [w.clone() for w in theta0], None

    def memory(theta, u):
        h = u
        for i, w in enumerate(theta):
            if i and i % factors == 0:
                h = h * torch.sigmoid(h)
            h = h @ w.T
        return u + h

    for g in grads:
        s = (g * g).mean().sqrt()
        leaf = [w.clone().requires_grad_() for w in theta]
        answer = memory(leaf, g / s)
        target = g / s if value is None else value(g) / s
        loss = plain_objective(objective, answer, target, previous)
        deltas = torch.autograd.grad(loss, leaf)
        theta = [w0 + 0.8 * (w - w0) - 0.05 * d for w, w0, d in zip(theta, theta0, deltas, strict=True)]
        previous = answer.detach().mean(0)
        W = W - 0.1 * s * memory(theta, g / s)
    return W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ["dot", "l2", "surrogate"])
@pytest.mark.parametrize("depth_rank", [(2, None), (3, None), (3, 2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_equal_to_the_equation(shape, objective, depth_rank, recompute):
    depth, rank = depth_rank
    value = newton_schulz.quintic if objective == "l2" else None
    (p,) = weights_of([shape])
    options = {**OPTIONS, "objective": objective, "depth": depth, "rank": rank, "value": value}
    optimizer = DeepMomentumGD([p], recompute=recompute, **options)
    train(optimizer, [p])
    matrix = (1, -1) if len(shape) == 1 else (shape[0], -1)
    grads = [g.reshape(matrix) for g in gradients(shape)]
    theta0 = list(optimizer.state[p]["initial"].values())
    assert len(theta0) == depth * (1 if rank is None else 2)
    start = torch.ones(shape, dtype=torch.float64).reshape(matrix)
    expected = reference(start, grads, theta0, objective, 1 if rank is None else 2, value)
    torch.testing.assert_close(p.detach().reshape(matrix), expected, rtol=0, atol=1e-12)
    theta = optimizer.state[p]["weights"].values()
    moved = [not torch.equal(a, b) for a, b in zip(theta0, theta, strict=True)]
    assert any(moved)


def test_a_new_memory_is_the_identity_and_l2_keeps_it():
    p, q = weights_of([(16, 5)] * 2)
    train(DeepMomentumGD([p], lr=0.1, objective="l2"), [p])
    train(torch.optim.SGD([q], lr=0.1), [q])
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_shared_memory_learns_from_the_rows_of_all_its_matrices():
    """Two equal shapes are one matrix of twice the rows; without sharing each learns alone."""
    together, stacked = weights_of([(16, 5)] * 2), weights_of([(32, 5)])
    g = gradients((32, 5), 5, 7)
    g = g / g.view(5, 2, 16, 5).square().mean((2, 3), keepdim=True).sqrt().expand(5, 2, 16, 5).reshape(
        5, 32, 5
    )
    a, b = (DeepMomentumGD(params, **OPTIONS) for params in (together, stacked))
    for grad in g:
        together[0].grad, together[1].grad = grad[:16].clone(), grad[16:].clone()
        stacked[0].grad = grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(
        torch.cat([p.detach() for p in together]), stacked[0].detach(), rtol=0, atol=1e-12
    )
    assert sum("weights" in state for state in a.state.values()) == 1
    params = weights_of([(16, 5)] * 2)
    alone = DeepMomentumGD(params, shared_memory=False)
    train(alone, params)
    assert sum("weights" in state for state in alone.state.values()) == 2


def test_the_scale_of_the_loss_scales_the_step_and_nothing_else():
    a, b = weights_of([(16, 5)] * 2)
    optimizers = [DeepMomentumGD([p], **OPTIONS, objective="surrogate") for p in (a, b)]
    for g in gradients((16, 5)):
        a.grad, b.grad = g.clone(), 1e-6 * g
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close((b.detach() - 1) * 1e6, a.detach() - 1, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("objective", ["dot", "l2", "surrogate"])
def test_zero_gradients_and_zero_rows_stay_finite(objective):
    p = weights_of([(16, 5)])[0]
    optimizer = DeepMomentumGD([p], objective=objective, memory_lr=0.1)
    for step in range(4):
        p.grad = torch.zeros(16, 5, dtype=torch.float64)
        if step % 2:
            p.grad[3] = 1.0
        optimizer.step()
        assert p.isfinite().all()
        assert optimizer.get_internal_loss()[0].isfinite()
        assert all(w.isfinite().all() for w in optimizer.state[p]["weights"].values())


def test_internal_loss_falls_on_a_repeated_gradient():
    p = weights_of([(16, 24)])[0]
    optimizer = DeepMomentumGD(
        [p], objective="l2", value=newton_schulz.quintic, memory_lr=1.0, momentum=1.0, hidden_size=16
    )
    with pytest.raises(ValueError, match="call step"):
        optimizer.get_internal_loss()
    losses = []
    for _ in range(200):
        p.grad = gradients((16, 24))[0]
        optimizer.step()
        losses.append(float(optimizer.get_internal_loss()[0]))
    assert losses[-1] < 0.5 * losses[0]


def test_internal_loss_per_group():
    params = weights_of([(16, 5), (8, 4), (3,)])
    optimizer = DeepMomentumGD([{"params": [p]} for p in params], objective="dot")
    params[0].grad, params[1].grad = (torch.randn_like(p) for p in params[:2])
    optimizer.step()
    losses = optimizer.get_internal_loss()
    assert float(losses[0]) == pytest.approx(-1)  # −mean(û²) of the identity
    assert float(losses[1]) == pytest.approx(-1)
    assert losses[2].isnan()


def test_state_is_smaller_than_ten_million_parameters():
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(9)], nn.Linear(1024, 512))
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) > 9.9e6
    optimizer = DeepMomentumGD(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    ratio = optimizer.state_bytes() / tensor_bytes(parameters)
    assert ratio == pytest.approx(0.0532, abs=1e-3)
    assert ratio <= 1.0


# -- through the update


class Setting:
    """A linear model, one training step and a validation loss of the new weights."""

    def __init__(self, objective, recompute=False, rank=None):
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 5), nn.Linear(5, 16)).double()
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
        self.x = torch.randn(10, 5, generator=g, dtype=torch.float64)
        self.y = torch.randn(10, 16, generator=g, dtype=torch.float64)
        value = newton_schulz.quintic if objective == "l2" else None
        self.optimizer = DeepMomentumGD(
            self.model.parameters(), **OPTIONS, objective=objective, weight_decay=0.1, meta_lr=1.0,
            recompute=recompute, rank=rank, value=value,
        )  # fmt: skip
        self.train_step()  # the last layer starts at zero: leave that point
        self.train_step()

    def train_step(self, **options):
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step(**options)

    def validation_loss(self, parameters):
        return F.mse_loss(torch.func.functional_call(self.model, parameters, 2 * self.x), -self.y)

    def tensors(self, name):
        states = [state for state in self.optimizer.state.values() if name in state]
        return [w for state in states for w in state[name].values()]


@pytest.mark.parametrize("objective", ["dot", "l2", "surrogate"])
@pytest.mark.parametrize(("recompute", "rank"), [(False, None), (True, 2)])
def test_meta_gradient_equals_finite_differences(objective, recompute, rank):
    def loss_after_a_step(shift, directions):
        setting = Setting(objective, recompute, rank)
        for name in ("weights", "initial"):
            for w, d in zip(setting.tensors(name), directions, strict=True):
                w.add_(d, alpha=shift)
        setting.train_step()
        return setting.validation_loss(dict(setting.model.named_parameters())).item()

    setting = Setting(objective, recompute, rank)
    g = torch.Generator().manual_seed(9)
    directions = [torch.randn(w.shape, generator=g, dtype=w.dtype) for w in setting.tensors("weights")]
    setting.train_step(create_graph=True)
    before = {name: [w.clone() for w in setting.tensors(name)] for name in ("weights", "initial")}
    loss = setting.validation_loss(setting.optimizer.updated_parameters(setting.model))
    assert loss.item() == setting.validation_loss(dict(setting.model.named_parameters())).item()
    setting.optimizer.meta_step(loss)
    for name, old in before.items():
        moved = [a - b for a, b in zip(old, setting.tensors(name), strict=True)]
        slope = sum(float((m * d).sum()) for m, d in zip(moved, directions, strict=True))
        h = 1e-4
        expected = (loss_after_a_step(h, directions) - loss_after_a_step(-h, directions)) / (2 * h)
        assert slope == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 1e-8


def test_keeping_the_graph_changes_no_number():
    a, b = Setting("dot"), Setting("dot")
    a.train_step()
    b.train_step(create_graph=True)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    for v, w in zip(a.tensors("weights"), b.tensors("weights"), strict=True):
        assert torch.equal(v, w)


def test_meta_steps_lower_the_loss_after_a_step():
    setting = Setting("dot")
    start = [p.detach().clone() for p in setting.model.parameters()]
    losses = []
    setting.optimizer.param_groups[0]["meta_lr"] = 0.2
    for _ in range(30):
        with torch.no_grad():
            for p, s in zip(setting.model.parameters(), start, strict=True):
                p.copy_(s)
        setting.train_step(create_graph=True)
        loss = setting.validation_loss(setting.optimizer.updated_parameters(setting.model))
        setting.optimizer.meta_step(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert losses == sorted(losses, reverse=True)


def test_meta_step_errors_and_skips():
    setting = Setting("dot")
    with pytest.raises(ValueError, match="create_graph=True"):
        setting.optimizer.meta_step(torch.ones(()))
    setting.train_step(create_graph=True)
    with pytest.raises(ValueError, match="functional_call"):
        setting.optimizer.meta_step(torch.ones(()))
    with pytest.raises(ValueError, match="create_graph=True"):
        setting.optimizer.updated_parameters(setting.model)
    before = [w.clone() for w in setting.tensors("weights")]
    setting.model[0].weight.grad[0, 0] = float("nan")
    setting.optimizer.step(create_graph=True)
    setting.optimizer.meta_step(setting.validation_loss(setting.optimizer.updated_parameters(setting.model)))
    assert setting.optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, setting.tensors("weights"), strict=True))


def test_bad_options():
    p = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="objective must be one of dot, l2, surrogate; got 'mse'"):
        DeepMomentumGD([p], objective="mse")
    with pytest.raises(ValueError, match="depth must be a finite whole number >= 2, got 1"):
        DeepMomentumGD([p], depth=1)
    with pytest.raises(ValueError, match=r"rank must be a finite whole number >= 1, got 0\. .*None"):
        DeepMomentumGD([p], rank=0)
    with pytest.raises(ValueError, match=r"value must be a function .*got 'double'"):
        DeepMomentumGD([p], value="double")
    p.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), got \(4,\)"):
        DeepMomentumGD([p], value=lambda g: g[:, 0]).step()
