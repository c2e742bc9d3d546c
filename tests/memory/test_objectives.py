"""Each objective's direction is minus the gradient of its loss, and its declared slopes and bounds hold."""

from __future__ import annotations

import pytest
import torch

from nested_learning.memory.objective import L2, OBJECTIVES, AtKey, Dot, Huber, Lp, Oja

WIDTH = 0.7


def smooth_lp(e, p):
    """A potential of p tanh(10 e) (e² + 10⁻⁶)^((p−1)/2), by the trapezoid rule on a fine grid from 0."""
    steps = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    points = e.unsqueeze(-1) * steps
    slopes = p * torch.tanh(10 * points) * (points.square() + 1e-6) ** ((p - 1) / 2)
    return (torch.trapezoid(slopes, steps, dim=-1) * e).sum()


def huber(e):
    norm = e.norm(dim=-1)
    return torch.where(norm <= WIDTH, 0.5 * norm.square(), WIDTH * (norm - 0.5 * WIDTH)).sum()


# Loss of an answer, given the value and the residual, [C, d] each.
LOSSES = {
    Dot(of_residual=False): lambda answer, value, residual: -(answer * value).sum(),
    Dot(): lambda answer, value, residual: -(answer * residual).sum(),
    L2(): lambda answer, value, residual: 0.5 * (answer - residual).square().sum(),
    Lp(3.0): lambda answer, value, residual: smooth_lp(answer - residual, 3.0),
    Huber(): lambda answer, value, residual: huber(answer - residual),
    Oja(): lambda answer, value, residual: 0.5 * (answer - residual).square().sum(),
}


def at_key(answer, value, residual):
    return AtKey(value, residual, answer, torch.full(answer.shape[:-1], WIDTH, dtype=answer.dtype))


def test_every_objective_has_a_loss_here():
    assert {type(objective) for objective in LOSSES} == set(OBJECTIVES.values())


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
def test_direction_is_minus_the_gradient(objective):
    torch.manual_seed(0)
    answer, value, residual = torch.randn(3, 6, 4, dtype=torch.float64)
    answer.requires_grad_()
    (slope,) = torch.autograd.grad(LOSSES[objective](answer, value, residual), answer)
    torch.testing.assert_close(
        objective.direction(at_key(answer, value, residual)), -slope, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
def test_sees_the_answer_or_not(objective):
    torch.manual_seed(0)
    answer, value, residual = torch.randn(3, 6, 4, dtype=torch.float64)
    same = torch.equal(
        objective.direction(at_key(answer, value, residual)),
        objective.direction(at_key(answer + 1, value, residual)),
    )
    assert same != objective.sees_answer


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
def test_bounded_as_declared(objective):
    """Between errors of 1 and of 1,000 a bounded gradient grows at most a thousandfold."""
    zero = torch.zeros(1, 4, dtype=torch.float64)
    sizes = []
    for length in (1.0, 1000.0):
        answer = torch.tensor([[length, 0, 0, 0]], dtype=torch.float64)
        sizes.append(objective.direction(at_key(answer, zero + 1, zero)).norm().item())
    assert (sizes[1] <= 1000 * max(sizes[0], 1.0) * 1.001) == objective.bounded


@pytest.mark.parametrize("objective", LOSSES, ids=repr)
def test_no_steeper_than_declared(objective):
    """The largest slope of the gradient at errors up to 1; 0.6 % for the smooth sign and |e| of Lp."""
    e = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    answer = torch.stack([e, *[torch.zeros_like(e)] * 3], dim=1)
    slopes = objective.direction(at_key(answer, torch.ones_like(answer), torch.zeros_like(answer)))[
        :, 0
    ].diff()
    steepest = (slopes / e.diff()).abs().max().item()
    assert steepest <= 1.006 * objective.steepness
    if objective.sees_answer:
        assert steepest > 0.9 * objective.steepness
