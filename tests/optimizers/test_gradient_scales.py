"""Gradients of every size that a dtype holds, from 1e-30 to 1e18 in float32: squares of them leave float32.

Oracles: the same rule in float64, whose squares stay in range, and where a rule is homogeneous of degree one
its own step at scale one, bit by bit, since the scales are powers of two.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nested_learning.optimizers import (
    M3,
    AdaGradMemory,
    AdamMemory,
    DeltaGD,
    MemoryOptimizer,
    PreconditionedMomentum,
    adagrad_optimum,
    adam_optimum,
    row_memory,
)
from nested_learning.optimizers.memory_forms import MEMORIES
from tests.optimizers.cases import CASES

SHAPES = [(4, 6), (6, 4), (5,), ()]
SCALES = (-30, -25, -19, -9, 0, 9, 18)
# Newton-Schulz in bfloat16, the default, is another function than in float64: not what is compared here.
NS = {"orthogonal": "ns_dtype", "orthogonal-cubic": "ns_dtype", "m3": "ns_dtype", "m3-paper": "ns_dtype"}
# The printed forms with a power of the gradient in them: what they ask for leaves float32 too.
PRINTED = {"delta-paper", "feature-paper"}
# Rules of which c·g makes c times the step of g.
HOMOGENEOUS = [
    "gd",
    "momentum",
    "preconditioned",
    "preconditioned-learned",
    "delta",
    "feature",
    "dmgd",
    "dmgd-l2",
    "dmgd-surrogate",
    "delta-gd",
]


def gradients(scale: float, dtype: torch.dtype, steps: int = 4) -> list[list[torch.Tensor]]:
    """Per step and parameter, with an element that is always zero."""
    g = torch.Generator().manual_seed(0)
    every = [[torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for _ in range(steps)]
    for of_step in every:
        of_step[0][1, 2] = 0
    return [[(scale * t).to(dtype) for t in of_step] for of_step in every]


def weights_after(name, grads, dtype):
    """Weights that started at zero, after a step for each of `grads`."""
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]
    optimizer = CASES[name](params, **({NS[name]: str(dtype)[6:]} if name in NS else {}))
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    return [p.detach() for p in params]


def scales(dtype):
    return [k for k in SCALES if dtype != torch.float16 or -5 < k < 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_float64_at_every_scale(name, dtype):
    work = torch.float32 if name in NS else dtype
    for k in scales(dtype):
        grads = gradients(10.0**k, dtype)
        found = weights_after(name, grads, work)
        expected = weights_after(name, grads, torch.float64)
        largest = max(float(w.abs().max()) for w in expected)
        if name in PRINTED and largest > torch.finfo(work).max ** 0.5:
            continue
        tolerance = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}[work]
        for w, e in zip(found, expected, strict=True):
            assert w.isfinite().all(), k
            # weights in half precision are rounded at every step, whatever cancels in the end
            size = float(e.abs().max()) if work == torch.float32 else largest + float(torch.finfo(work).tiny)
            assert float((w - e).abs().max()) <= tolerance * size, k


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("exponent", [-100, -83, 60])
def test_a_homogeneous_rule_scales_bit_by_bit(name, exponent):
    """2⁻¹⁰⁰ is about 1e-30, 2⁶⁰ about 1e18."""
    one = weights_after(name, gradients(1.0, torch.float32), torch.float32)
    scale = 2.0**exponent
    scaled = [[g * scale for g in of_step] for of_step in gradients(1.0, torch.float32)]
    for a, b in zip(one, weights_after(name, scaled, torch.float32), strict=True):
        assert torch.equal(a * scale, b)


@pytest.mark.parametrize("k", SCALES)
def test_a_zero_epsilon_divides_by_no_zero(k):
    """The square of 1e-30 is 0 in float32, and that of a gradient that is zero everywhere."""
    builds = [
        lambda ps: MemoryOptimizer(ps, AdamMemory(eps=0.0), lr=0.1),
        lambda ps: MemoryOptimizer(ps, AdaGradMemory(eps=0.0), lr=0.1),
        lambda ps: PreconditionedMomentum(ps, lr=0.1, preconditioner="diagonal", eps=0.0),
        lambda ps: M3(ps, lr=0.1, eps=1e-45, adamw_eps=0.0, ns_eps=1e-30),
    ]
    for build in builds:
        params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3))]
        optimizer = build(params)
        for _ in range(3):
            params[0].grad = torch.zeros(3, 4)
            params[0].grad[1] = 10.0**k
            params[1].grad = torch.tensor([0.0, 10.0**k, -(10.0**k)])
            optimizer.step()
        for p in params:
            assert p.isfinite().all()
            assert p.abs().max() <= 1.0
            if k >= -9:  # where the squares are in range the scale does not matter
                assert p.abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MEMORIES)
def test_the_forms_have_finite_gradients(name, dtype):
    memory = MEMORIES[name]()
    for k in scales(dtype):
        grads = [of_step[0].requires_grad_() for of_step in gradients(10.0**k, dtype)]
        state = memory.init(grads[0])
        for g in grads:
            state = memory.update(state, g)
        u = memory.read(state)
        u.sum().backward()
        assert u.isfinite().all()
        assert all(g.grad is None or g.grad.isfinite().all() for g in grads)


@pytest.mark.parametrize("k", SCALES)
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1e3])
def test_the_closed_forms_at_every_scale(k, ridge):
    g = 10.0**k * torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = g.float().double()
    by_hand = exact.sum(0) * target / (exact.square().sum(0) + ridge)
    torch.testing.assert_close(
        adam_optimum(g.float(), target.float(), ridge).double(), by_hand, rtol=1e-4, atol=0
    )
    values, vectors = torch.linalg.eigh(exact.T @ exact + ridge * torch.eye(4, dtype=torch.float64))
    by_hand = vectors @ ((vectors.T @ exact.sum(0)) / values.sqrt())
    found = adagrad_optimum(g.float(), ridge).double()
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max()))


def test_the_surrogate_objective_sees_rows_of_every_size():
    """A row that is 1e-25 of the others has the direction it has, and no gradient that is not finite."""
    value = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value[1] *= 1e-25
    value[2] = 0
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        matrix = turn.to(dtype).requires_grad_()
        rows = value.to(dtype)
        loss = row_memory.surrogate(rows + rows @ matrix, rows, None)
        losses.append(loss.detach().double())
        slopes.append(torch.autograd.grad(loss, matrix)[0].double())
    ratio = (value + value @ turn).norm(dim=-1) / value.norm(dim=-1).clamp(min=1e-300)
    cosine = torch.nn.functional.cosine_similarity(value + value @ turn, value, dim=-1, eps=1e-300)
    used = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    by_hand = ((1 - cosine) * used).mean() + ((ratio - 1).square() * used).mean()
    torch.testing.assert_close(losses[1], by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [-30, -20, 0, 12])
def test_delta_gd_with_inputs_of_every_size(k):
    """W ← (W − lr·G)(I + lr·E[xxᵀ])⁻¹ in float32 against float64."""
    x = 10.0**k * torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layer = nn.Linear(5, 2, bias=False).to(dtype)
        optimizer = DeltaGD(layer.parameters(), lr=0.5).attach(layer)
        layer(x.float().to(dtype)).sum().backward()
        optimizer.step()
        results.append(layer.weight.detach().double())
    assert results[0].isfinite().all()
    # in float32 the directions without inputs are lost in a sum with 1e24 (k = 12): they are not compared
    seen = torch.linalg.qr(x.T)[0]
    torch.testing.assert_close(results[0] @ seen, results[1] @ seen, rtol=1e-3, atol=1e-5)


def test_inputs_whose_squares_overflow_skip_the_step():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = DeltaGD(layer.parameters(), lr=0.1).attach(layer)
    layer(torch.full((2, 3), 1e25)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert layer.weight.isfinite().all()
    optimizer.error_if_nonfinite = True
    optimizer.zero_grad()
    layer(torch.full((2, 3), 1e25)).sum().backward()
    with pytest.raises(FloatingPointError, match="squares overflow"):
        optimizer.step()


def test_the_issue_of_vanishing_gradients():
    """1e-25 squared is zero in float32: an erase divided by it makes every weight NaN within some steps."""
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = CASES["delta"]([p])
    for _ in range(10):
        p.grad = torch.full((3, 4), 1e-25)
        optimizer.step()
    assert math.isclose(float(p.detach().sum()), 12.0)
