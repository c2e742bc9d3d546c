"""Eq 47, 49 and 51 against loops over single matrices that are written from the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nested_learning.ops import newton_schulz
from nested_learning.optimizers import DeltaMomentum, FeatureMomentum, PreconditionedMomentum

SHAPES = [(3, 5), (5, 3), (4,), (3, 2, 2)]
STEPS = 6


def gradients(shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(STEPS, *shape, generator=g, dtype=torch.float64)


def trained(optimizer_class, shape, grads, **options):
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = optimizer_class([p], lr=0.1, momentum=0.8, **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def matrix(t):
    return t.numpy().reshape(1, -1) if t.ndim < 2 else t.numpy().reshape(t.shape[0], -1)


def reference(shape, grads, retain, write):
    """W ← W − η m, m ← retain(m, g) + write(g), in numpy, on the (out, in) matrix."""
    W = np.ones(matrix(grads[0]).shape)
    m = np.zeros_like(W)
    for grad in grads:
        G = matrix(grad)
        m = retain(m, G) + write(G)
        W = W - 0.1 * m
    return torch.from_numpy(W.reshape(shape))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_sgd_with_momentum(shape):
    grads = gradients(shape)
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.8)
    for grad in grads:
        p.grad = grad
        sgd.step()
    close(trained(PreconditionedMomentum, shape, grads), p.detach())
    close(trained(DeltaMomentum, shape, grads, beta=0.0), p.detach())
    close(trained(FeatureMomentum, shape, grads, coefficients=(1.0,)), p.detach())
    close(trained(FeatureMomentum, shape, grads, coefficients=(1.0,), scale="paper"), p.detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_preconditioner(shape):
    grads, v, step = gradients(shape), [0.0], [0]

    def write(G):
        v[0], step[0] = 0.9 * v[0] + 0.1 * G**2, step[0] + 1
        return G / (np.sqrt(v[0] / (1 - 0.9 ** step[0])) + 1e-3)

    expected = reference(shape, grads, lambda m, G: 0.8 * m, write)
    got = trained(PreconditionedMomentum, shape, grads, preconditioner="diagonal", beta2=0.9, eps=1e-3)
    close(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_preconditioner_descends_its_objective(shape):
    """P ← P − ζ ∇½‖P ĝ − V‖² by autograd, on the short side of g."""
    grads, P = gradients(shape), [None]

    def write(G):
        g = torch.from_numpy(G if G.shape[0] <= G.shape[1] else G.T)
        P[0] = torch.eye(len(g), dtype=torch.float64) if P[0] is None else P[0]
        unit, value = g / g.norm(), newton_schulz.quintic(g)
        leaf = P[0].clone().requires_grad_()
        objective = 0.5 * (leaf @ unit - value / value.norm()).square().sum()
        P[0] = P[0] - 0.3 * torch.autograd.grad(objective, leaf)[0]
        result = (P[0] @ g).numpy()
        return result if result.shape == G.shape else result.T

    expected = reference(shape, grads, lambda m, G: 0.8 * m, write)
    close(
        trained(PreconditionedMomentum, shape, grads, preconditioner="learned", precondition_lr=0.3), expected
    )


def test_learned_preconditioner_orthogonalises_a_constant_gradient():
    p = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    g = gradients((3, 5))[0]
    optimizer = PreconditionedMomentum(
        [p], lr=1.0, momentum=0.0, preconditioner="learned", precondition_lr=1.9
    )
    for _ in range(2000):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    target = newton_schulz.quintic(g)
    torch.testing.assert_close((before - p.detach()) / g.norm(), target / target.norm(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_given_preconditioner(shape):
    grads = gradients(shape)
    out = matrix(grads[0]).shape[0]
    for P in (gradients((out, out), 3)[0], gradients(shape, 4)[0]):
        product = (lambda G, P=P: P.numpy() @ G) if P.shape == (out, out) else (lambda G, P=P: matrix(P) * G)
        p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = PreconditionedMomentum([p], lr=0.1, momentum=0.8, given={p: P})
        for grad in grads:
            p.grad = grad
            optimizer.step()
        close(p.detach(), reference(shape, grads, lambda m, G: 0.8 * m, product))
        assert torch.equal(optimizer.state_dict()["state"][0]["given"], P)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_delta_momentum_normalised(shape, beta):
    grads = gradients(shape)
    grads[2] = 0  # erases nothing
    retain = lambda m, G: 0.8 * m - beta * m @ (G.T @ G) / max((G**2).sum(), 1e-300)  # noqa: E731
    close(trained(DeltaMomentum, shape, grads, beta=beta), reference(shape, grads, retain, lambda G: G))


@pytest.mark.parametrize("shape", SHAPES)
def test_delta_momentum_as_printed(shape):
    grads = gradients(shape, scale=0.2)
    retain = lambda m, G: m @ (0.8 * np.eye(G.shape[1]) - G.T @ G)  # noqa: E731
    expected = reference(shape, grads, retain, lambda G: G)
    close(trained(DeltaMomentum, shape, grads, scale="paper"), expected)


def test_delta_momentum_with_a_preconditioner():
    grads, P = gradients((3, 5)), gradients((3, 3), 5)[0]
    retain = lambda m, G: 0.8 * m - m @ G.T @ G / (G**2).sum()  # noqa: E731
    expected = reference((3, 5), grads, retain, lambda G: P.numpy() @ G)
    p = nn.Parameter(torch.ones(3, 5, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=0.1, momentum=0.8, given={p: P})
    for grad in grads:
        p.grad = grad
        optimizer.step()
    close(p.detach(), expected)


def test_the_erase_takes_out_the_component_along_the_gradient():
    """With α = β = 1 a row of momentum keeps its part orthogonal to g and takes g for the rest."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=1.0, momentum=1.0)
    for grad in ([3.0, 4.0], [2.0, 0.0]):
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    close(optimizer.state[p]["momentum"], torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_the_printed_scale_depends_on_the_size_of_the_gradient():
    """Where ‖g‖² > 1 + α the printed form grows without bound; the normalised one does not."""
    grads = torch.tensor([[3.0, 0.0]]).double().repeat(40, 1)
    assert trained(DeltaMomentum, (2,), grads, scale="paper").abs().max() > 1e20
    assert trained(DeltaMomentum, (2,), grads).abs().max() < 20


@pytest.mark.parametrize("shape", SHAPES)
def test_features_as_printed_and_by_rms(shape):
    grads = gradients(shape)
    c = (0.7, 0.4, 0.1)

    def plain(G):
        return sum(cj * G ** (j + 1) for j, cj in enumerate(c))

    def scaled(G):
        r = np.sqrt((G**2).mean())
        return r * sum(cj * np.sign(G) * np.abs(G / r) ** (j + 1) for j, cj in enumerate(c))

    momentum = lambda m, G: 0.8 * m  # noqa: E731
    got = trained(FeatureMomentum, shape, grads, coefficients=c, scale="paper")
    close(got, reference(shape, grads, momentum, plain))
    close(trained(FeatureMomentum, shape, grads, coefficients=c), reference(shape, grads, momentum, scaled))
    far = trained(FeatureMomentum, shape, 1e6 * grads, coefficients=c) - 1
    torch.testing.assert_close(far / 1e6, reference(shape, grads, momentum, scaled) - 1, rtol=1e-9, atol=1e-9)


def test_bad_options():
    p = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"beta must be .*<= 1, got 1.5"):
        DeltaMomentum([p], beta=1.5)
    with pytest.raises(ValueError, match="scale must be one of normalised, paper; got 'rms'"):
        DeltaMomentum([p], scale="rms")
    with pytest.raises(ValueError, match="preconditioner must be one of"):
        PreconditionedMomentum([p], preconditioner="full")
    with pytest.raises(ValueError, match=r"\(2, 2\), got shape \(3, 3\)"):
        PreconditionedMomentum([p], given={p: torch.eye(3)})
    for given in ("diagonal", {0: torch.eye(2)}, {p: 1.0}):
        with pytest.raises(ValueError, match="given must have a tensor P for each"):
            PreconditionedMomentum([p], given=given)
    with pytest.raises(ValueError, match="no group"):
        PreconditionedMomentum([p], given={nn.Parameter(torch.ones(2)): torch.eye(1)})
    with pytest.raises(ValueError, match="coefficients must be"):
        FeatureMomentum([p], coefficients=(1.0, float("nan")))
    with pytest.raises(ValueError, match=r"precondition_lr must be .*< 2, got 2"):
        PreconditionedMomentum([p], precondition_lr=2)
