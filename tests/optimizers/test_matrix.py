"""Eq 52 against torch.optim.Muon, M3 against Algorithm 1 written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nested_learning.ops import newton_schulz
from nested_learning.optimizers import M3, OrthogonalMomentum, matrix
from nested_learning.optimizers.matrix import MAX_STACKED, orthogonalise

SHAPES = [(4, 6), (6, 4), (4, 6), (5, 5)]


def gradients(shape, steps=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=g, dtype=torch.float64)


def parameters(dtype=torch.float64):
    return [nn.Parameter(gradients(s, 1, i)[0].to(dtype)) for i, s in enumerate(SHAPES)]


def train(optimizer, params, steps=12):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, steps, 10 + i)[step].to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_torch_muon(nesterov, adjust, dtype):
    """With Muon's cast to bfloat16 inside the iteration; shapes repeat, so ours runs them as a batch."""
    ours, theirs = parameters(dtype), parameters(dtype)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    train(OrthogonalMomentum(ours, adjust_lr=adjust, ns_dtype="bfloat16", **options), ours)
    train(torch.optim.Muon(theirs, adjust_lr_fn=adjust, **options), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=12 * 0.02 * 2**-7)  # steps · lr · one bfloat16 rounding


@pytest.mark.parametrize("nesterov", [True, False])
def test_equal_to_the_equation_in_float64(nesterov):
    params = parameters()
    train(OrthogonalMomentum(params, lr=0.02, momentum=0.9, nesterov=nesterov), params)
    for i, (p, W) in enumerate(zip(params, parameters(), strict=True)):
        W, m = W.detach(), torch.zeros(p.shape, dtype=torch.float64)
        for g in gradients(p.shape, 12, 10 + i):
            m = 0.9 * m + 0.1 * g
            read = 0.9 * m + 0.1 * g if nesterov else m
            W = W - 0.02 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * newton_schulz.quintic(read)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


def test_the_step_has_singular_values_in_muons_band():
    p = nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    p.grad = gradients((16, 24), 1)[0]
    OrthogonalMomentum([p], lr=1.0).step()
    values = torch.linalg.svdvals(p.detach())
    assert values.min() > 0.65
    assert values.max() < 1.25


def algorithm_1(W, grads, betas, alpha, eps, f, eta):
    """Algorithm 1 as printed: blocks of f steps, sums, no correction."""
    M1, M2, V = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W)
    for k in range(math.ceil(len(grads) / f)):
        O2 = torch.zeros_like(W)
        if k > 0:
            M2 = M2 + betas[2] * sum(grads[(k - 1) * f : k * f])
            O2 = newton_schulz.quintic(M2)
        for g in grads[k * f : (k + 1) * f]:
            M1 = M1 + betas[0] * g
            V = V + betas[1] * g * g
            W = W - eta * (newton_schulz.quintic(M1) + alpha * O2) / (V.sqrt() + eps)
    return W


@pytest.mark.parametrize("f", [1, 3, 5, 20])
def test_m3_paper_exact_is_algorithm_1(f):
    params = parameters()
    train(M3(params, lr=0.1, betas=(0.9, 0.8, 0.7), alpha=0.4, frequency=f, paper_exact=True), params)
    for i, (p, W) in enumerate(zip(params, parameters(), strict=True)):
        expected = algorithm_1(W.detach(), gradients(p.shape, 12, 10 + i), (0.9, 0.8, 0.7), 0.4, 1e-8, f, 0.1)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("f", [1, 3, 20])
@pytest.mark.parametrize("nesterov", [True, False])
def test_m3_with_averages(f, nesterov):
    params = parameters()
    options = {"betas": (0.9, 0.8, 0.7), "alpha": 0.4, "eps": 1e-3, "frequency": f, "nesterov": nesterov}
    train(M3(params, lr=0.1, **options), params)
    for i, (p, W) in enumerate(zip(params, parameters(), strict=True)):
        W, grads = W.detach(), gradients(p.shape, 12, 10 + i)
        M1, M2, V, O2 = (torch.zeros_like(W) for _ in range(4))
        for t, g in enumerate(grads):
            if t > 0 and t % f == 0:
                M2 = 0.7 * M2 + 0.3 * sum(grads[t - f : t])
                O2 = newton_schulz.quintic(M2)
            M1, V = 0.9 * M1 + 0.1 * g, 0.8 * V + 0.2 * g * g
            read = 0.9 * M1 + 0.1 * g if nesterov else M1
            numerator = newton_schulz.quintic(read) + 0.4 * O2
            U = numerator / ((V / (1 - 0.8 ** (t + 1))).sqrt() + 1e-3)
            W = W - 0.1 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * U * numerator.norm() / U.norm()
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


def test_m3_steps_keep_their_size_where_the_printed_sums_shrink_them():
    """One constant gradient for 400 steps: the printed form's last step is √(1/400) of its first."""

    def last_over_first(**options):
        p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer, moves = M3([p], lr=0.1, alpha=0.0, **options), []
        for _ in range(400):
            before = p.detach().clone()
            p.grad = gradients((3, 4), 1)[0]
            optimizer.step()
            moves.append((p.detach() - before).norm())
        return float(moves[-1] / moves[0])

    assert last_over_first() == pytest.approx(1, rel=1e-6)
    assert last_over_first(paper_exact=True) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("optimizer_class", [OrthogonalMomentum, M3])
def test_the_rest_is_adamw(optimizer_class):
    shapes = [(3,), (2, 2, 3), (4, 5)]
    ours, theirs = ([nn.Parameter(gradients(s, 1)[0]) for s in shapes] for _ in range(2))
    groups = [{"params": ours[:2]}, {"params": ours[2:], "adamw_only": True}]
    train(optimizer_class(groups, lr=0.1, adamw_lr_scale=0.3, adamw_betas=(0.8, 0.9)), ours)
    train(torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.9), weight_decay=0.0), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_batches_are_split_before_they_grow_large(monkeypatch):
    matrices = [gradients(s, 1, i)[0] for i, s in enumerate(SHAPES)]
    whole = orthogonalise(matrices, "quintic", 5, "auto", 1e-7)
    monkeypatch.setattr("nested_learning.optimizers.matrix.MAX_STACKED", 25)
    assert MAX_STACKED > 25
    for a, b in zip(orthogonalise(matrices, "quintic", 5, "auto", 1e-7), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bad_options():
    p = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="three numbers"):
        M3([p], betas=(0.9, 0.9))
    with pytest.raises(ValueError, match=r"three numbers .*got 0\.9"):
        M3([{"params": [p], "betas": 0.9}])
    with pytest.raises(ValueError, match="adamw_betas must be two numbers"):
        OrthogonalMomentum([p], adamw_betas=(0.9,))
    assert M3([p], betas=[0.9, 0.8, 0.7]).defaults["betas"] == (0.9, 0.8, 0.7)
    with pytest.raises(ValueError, match=r"frequency must be a finite whole number >= 1, got 0"):
        M3([p], frequency=0)
    with pytest.raises(ValueError, match="nesterov=True goes with averages"):
        M3([p], paper_exact=True, nesterov=True)
    with pytest.raises(ValueError, match="ns_dtype must be one of auto"):
        M3([p], ns_dtype="float16")
    with pytest.raises(ValueError, match="nesterov must be True or False"):
        OrthogonalMomentum([p], nesterov=1)
    with pytest.raises(ValueError, match="iteration must be one of quintic, cubic"):
        OrthogonalMomentum([p], iteration="svd")


@pytest.mark.parametrize("cls", [OrthogonalMomentum, M3])
def test_auto_iterates_in_float32_where_bfloat16_is_slow(cls, monkeypatch):
    def after(slow: bool, **options: str) -> list[torch.Tensor]:
        monkeypatch.setattr(matrix, "bfloat16_is_slow", lambda device: slow)
        params = parameters(torch.float32)
        train(cls(params, lr=0.02, **options), params, steps=3)
        return params

    for slow, dtype in ((True, "float32"), (False, "bfloat16")):
        for auto, named in zip(after(slow), after(slow, ns_dtype=dtype), strict=True):
            assert torch.equal(auto, named)
    assert any(not torch.equal(a, b) for a, b in zip(after(True), after(False), strict=True))
