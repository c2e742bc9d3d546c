"""Preconditioned momentum as a pure function (eq 47, eq 41): equal to the optimizer, and differentiable."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from nested_learning.optimizers import MemoryOptimizer, PreconditionedMomentum, PreconditionedMomentumMemory

SHAPES = [(3, 5), (5, 3), (4,), (3, 2, 2)]
STEPS = 6


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P_MATRIX, P_ELEMENTS = numbers(3, 3, seed=5), numbers(3, 5, seed=6)
KINDS = {
    "identity": {},
    "diagonal": {"preconditioner": "diagonal", "beta2": 0.9, "eps": 1e-3},
    "diagonal-default": {"preconditioner": "diagonal"},
    "diagonal-no-average": {"preconditioner": "diagonal", "beta2": 0.0},
    "learned": {"preconditioner": "learned", "precondition_lr": 0.3},
}


def directions(memory, grads):
    """u after each write."""
    state, found = memory.init(grads[0]), []
    for grad in grads:
        state = memory.update(state, grad)
        found.append(memory.read(state))
    return found


def assert_equal_to_the_optimizer(shape, options, given):
    grads, p = numbers(STEPS, *shape), nn.Parameter(torch.ones(shape, dtype=torch.float64))
    by = {} if given is None else {"given": {p: given}}
    optimizer = PreconditionedMomentum([p], lr=0.1, momentum=0.8, **options, **by)
    memory = PreconditionedMomentumMemory(0.8, given=given, **options)
    W = torch.ones(shape, dtype=torch.float64)
    for grad, u in zip(grads, directions(memory, grads), strict=True):
        p.grad = grad.clone()
        optimizer.step()
        W = W - 0.1 * u
        torch.testing.assert_close(W, p.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_equals_the_optimizer_step_by_step(shape, options):
    assert_equal_to_the_optimizer(shape, options, None)


@pytest.mark.parametrize("given", [P_MATRIX, P_ELEMENTS])
def test_a_given_preconditioner_equals_the_optimizers(given):
    assert_equal_to_the_optimizer((3, 5), {}, given)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_in_memory_optimizer_it_is_the_optimizer(options):
    """Its state goes through a checkpoint in the middle."""
    p, q = (nn.Parameter(torch.ones(3, 5, dtype=torch.float64)) for _ in range(2))
    memory = PreconditionedMomentumMemory(0.8, **options)
    ours = MemoryOptimizer([p], memory, lr=0.1, weight_decay=0.3)
    theirs = PreconditionedMomentum([q], lr=0.1, momentum=0.8, weight_decay=0.3, **options)
    for step, grad in enumerate(numbers(STEPS, 3, 5)):
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
        if step == 2:
            kept = ours.state_dict()
            ours = MemoryOptimizer([p], memory, lr=0.1, weight_decay=0.3)
            ours.load_state_dict(kept)
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_state_of_another_preconditioner_is_refused():
    p = nn.Parameter(torch.ones(3, 5))
    kept = MemoryOptimizer([p], PreconditionedMomentumMemory(preconditioner="learned"))
    p.grad = torch.ones(3, 5)
    kept.step()
    other = MemoryOptimizer([p], PreconditionedMomentumMemory(preconditioner="diagonal"))
    with pytest.raises(ValueError, match=r"another memory: it holds momentum, preconditioner"):
        other.load_state_dict(kept.state_dict())


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3,)])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradients_flow_through_the_updates(shape, options):
    """All directions together, so that each write is seen by itself and through what it left behind."""
    memory = PreconditionedMomentumMemory(0.8, **options)
    assert torch.autograd.gradcheck(
        lambda grads: torch.stack(directions(memory, grads)), numbers(3, *shape).requires_grad_()
    )


@pytest.mark.parametrize("given", [P_MATRIX, P_ELEMENTS])
def test_gradients_flow_to_a_given_preconditioner(given):
    def last(P, grads):
        return directions(PreconditionedMomentumMemory(0.8, given=P), grads)[-1]

    inputs = given.clone().requires_grad_(), numbers(3, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(last, inputs)
    assert torch.autograd.gradgradcheck(last, inputs)


def test_the_learned_preconditioner_moves_the_directions_after_it():
    """The derivative of a later direction by an earlier gradient is not that of momentum alone."""
    grads = numbers(2, 3, 5).requires_grad_()
    memory = PreconditionedMomentumMemory(0.0, "learned", precondition_lr=0.3)
    (found,) = torch.autograd.grad(directions(memory, grads)[1].square().sum(), grads)
    assert found[0].abs().max() > 1e-3  # with α = 0 only P remembers


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_batch_of_rows(options):
    """Each row is what it is alone, and so are its gradients."""
    memory = PreconditionedMomentumMemory(0.8, **options)
    grads = numbers(3, 4, 3, 5).requires_grad_()  # [steps, rows, out, in]
    state = vmap(memory.init)(grads[0])
    for grad in grads:
        state = vmap(memory.update)(state, grad)
    together = vmap(memory.read)(state)
    alone = torch.stack([directions(memory, grads[:, row])[-1] for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(u.square().sum(), grads)[0] for u in (together, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_zeros_write_nothing_and_have_finite_derivatives(options):
    memory = PreconditionedMomentumMemory(0.8, **options)
    grads = torch.zeros(3, 3, 5, dtype=torch.float64)
    grads[1] = numbers(3, 5)
    grads.requires_grad_()
    found = directions(memory, grads)
    assert not found[0].any()
    torch.testing.assert_close(found[2], 0.8 * found[1], rtol=0, atol=1e-15)
    found[2].sum().backward()
    assert grads.grad.isfinite().all()


def test_a_meta_gradient_learns_the_preconditioner():
    """Descent on the loss after an unrolled run finds a P with which the run comes closer to the minimum."""
    curvature = torch.tensor([[1.0], [0.05], [0.01]], dtype=torch.float64)
    P = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)

    def loss_after(P):
        W = torch.ones(3, 2, dtype=torch.float64)
        memory = PreconditionedMomentumMemory(0.5, given=P)
        state = memory.init(W)
        for _ in range(8):
            state = memory.update(state, curvature * W)
            W = W - 0.3 * memory.read(state)
        return 0.5 * (curvature * W.square()).sum()

    before = loss_after(P).item()
    for _ in range(40):
        (g,) = torch.autograd.grad(loss_after(P), P)
        P = (P - 20 * g).detach().requires_grad_()
    assert loss_after(P).item() < 0.5 * before
    assert (P[1] > P[0]).all()  # flat directions are walked faster


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum must be"),
        ({"preconditioner": "full"}, "preconditioner must be one of identity, diagonal, learned"),
        ({"beta2": 1.0}, "beta2 must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"precondition_lr": 2.0}, "precondition_lr must be"),
        ({"given": P_MATRIX, "preconditioner": "learned"}, "takes the place of 'learned'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PreconditionedMomentumMemory(**options)


def test_a_given_preconditioner_that_does_not_fit():
    memory = PreconditionedMomentumMemory(given=P_MATRIX)
    with pytest.raises(ValueError, match=r"shape of its parameter \(5, 3\) or \(5, 5\), got shape \(3, 3\)"):
        memory.init(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="is a tensor, got 'diagonal'"):
        PreconditionedMomentumMemory(given="diagonal").init(torch.zeros(5, 3))
