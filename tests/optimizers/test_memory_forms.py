"""The classics as pure functions: equal to torch.optim, differentiable, and optimal as the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nested_learning.optimizers import (
    AdaGradMemory,
    AdamMemory,
    GDMemory,
    MemoryOptimizer,
    MomentumMemory,
    adagrad_optimum,
    adam_optimum,
)
from nested_learning.optimizers import PreconditionedMomentumMemory as Preconditioned

PAIRS = {
    "sgd": (GDMemory(), lambda p: torch.optim.SGD(p, lr=0.01)),
    "momentum": (MomentumMemory(0.8), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8)),
    "adam": (
        AdamMemory((0.7, 0.9), 1e-6),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.7, 0.9), eps=1e-6),
    ),
    "adam-default": (AdamMemory(), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adam-no-first": (AdamMemory((0.0, 0.9)), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9))),
    "adagrad": (
        AdaGradMemory(0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1, eps=1e-10),
    ),
}
GRADS = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("memory", "reference"), PAIRS.values(), ids=PAIRS.keys())
def test_pure_functions_equal_torch_optim(memory, reference):
    p = nn.Parameter(torch.ones(3, 5, dtype=torch.float64))
    optimizer = reference([p])
    W, state = torch.ones(3, 5, dtype=torch.float64), memory.init(GRADS[0])
    for grad in GRADS:
        p.grad = grad
        optimizer.step()
        state = memory.update(state, grad)
        W = W - 0.01 * memory.read(state)
        torch.testing.assert_close(W, p.detach(), rtol=0, atol=1e-12)


def test_adamw_is_adam_memory_with_decoupled_decay():
    p, q = (nn.Parameter(torch.ones(3, 5, dtype=torch.float64)) for _ in range(2))
    ours = MemoryOptimizer([p], AdamMemory(), lr=0.01, weight_decay=0.3)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.3)
    for grad in GRADS:
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [m for m, _ in PAIRS.values()], ids=PAIRS.keys())
def test_gradients_flow_through_the_updates(memory):
    def last_direction(grads):
        state = memory.init(grads[0])
        for grad in grads:
            state = memory.update(state, grad)
        return memory.read(state)

    assert torch.autograd.gradcheck(last_direction, GRADS[:3].clone().requires_grad_())


@pytest.mark.parametrize("memory", [AdamMemory(), AdaGradMemory()])
def test_an_element_that_never_had_a_gradient_has_a_finite_derivative(memory):
    grads = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    state = memory.init(grads[0])
    for grad in grads:
        state = memory.update(state, grad)
    memory.read(state).sum().backward()
    assert grads.grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_adam_reads_alike_with_and_without_gradients(eps):
    """Two ways to compute it: one to differentiate, one on fewer passes; also where no gradient ever was."""
    memory = AdamMemory((0.8, 0.95), eps)
    grads = GRADS.clone()
    grads[:, 0] = 0
    grads[:, 1] *= 1e-12
    followed, plain = memory.init(grads[0]), memory.init(grads[0])
    for grad in grads:
        followed = memory.update(followed, grad.clone().requires_grad_())
        plain = memory.update(plain, grad)
        read, kept = memory.read(plain), plain.square.clone()
        torch.testing.assert_close(read, memory.read(followed).detach(), rtol=1e-13, atol=0)
        assert torch.equal(plain.square, kept)


def minimise(objective, shape, seed=1):
    """The argmin of a quadratic objective by one exact Newton step from a random point."""
    x = torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x), x)
    hessian = torch.autograd.functional.hessian(objective, x.detach()).reshape(x.numel(), x.numel())
    return x.detach() - torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(shape)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_adams_closed_form_is_the_argmin_of_eq_101(ridge):
    target = torch.rand(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objective = lambda m: (m * GRADS - target).square().sum() + ridge * m.square().sum()  # noqa: E731
    expected = minimise(objective, (3, 5))
    torch.testing.assert_close(adam_optimum(GRADS, target, ridge), expected, rtol=1e-10, atol=1e-12)


def test_targets_that_give_momentum_and_adam():
    """Eq 104 and 105: P = Σg² makes the optimum Σg, P = √Σg² makes it Σg/√Σg²."""
    H = GRADS.square().sum(0)
    torch.testing.assert_close(adam_optimum(GRADS, H), GRADS.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adam_optimum(GRADS, H.sqrt()), GRADS.sum(0) / H.sqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_adagrads_closed_form_is_an_argmin(ridge):
    grads = GRADS[:, 0]
    H = grads.T @ grads + ridge * torch.eye(5, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(H)
    P = vectors @ torch.diag(values.sqrt()) @ vectors.T

    def objective(m):
        return (grads @ m).square().sum() - 2 * (grads @ P @ m).sum() + ridge * m.square().sum()

    torch.testing.assert_close(
        adagrad_optimum(grads, ridge), minimise(objective, (5,)), rtol=1e-9, atol=1e-10
    )


def test_adam_and_adagrad_closed_forms_after_averaging_and_correcting():
    """With averages (corrected) for sums, eq 105 is torch's Adam; with sums and M̃ = g it is Adagrad."""
    beta1, beta2, n = 0.8, 0.95, len(GRADS)
    weights = lambda b: (b ** torch.arange(n - 1, -1, -1)).double().view(-1, 1, 1) * (1 - b) / (1 - b**n)  # noqa: E731
    M, H = (weights(beta1) * GRADS).sum(0), (weights(beta2) * GRADS**2).sum(0)
    memory = AdamMemory((beta1, beta2), eps=0.0)
    state = memory.init(GRADS[0])
    for grad in GRADS:
        state = memory.update(state, grad)
    torch.testing.assert_close(memory.read(state), M / H.sqrt(), rtol=1e-6, atol=1e-8)
    p = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = torch.optim.Adagrad([p], lr=1.0, eps=0.0)
    for grad in GRADS:
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
    expected = -GRADS[-1] / GRADS.square().sum(0).sqrt()
    torch.testing.assert_close(p.detach() - before, expected, rtol=1e-10, atol=1e-12)


def test_bad_hyperparameters():
    with pytest.raises(ValueError, match=r"betas must be .*< 1, got 1.0"):
        AdamMemory((0.9, 1.0))
    with pytest.raises(ValueError, match="betas must be two numbers"):
        AdamMemory((0.9,))
    with pytest.raises(ValueError, match="momentum"):
        MomentumMemory(1.5)
    with pytest.raises(ValueError, match="eps"):
        AdaGradMemory(eps=float("nan"))


def test_the_state_of_another_memory_is_refused():
    p = nn.Parameter(torch.ones(2))
    adam, momentum = MemoryOptimizer([p], AdamMemory()), MemoryOptimizer([p], MomentumMemory())
    p.grad = torch.ones(2)
    adam.step()
    with pytest.raises(ValueError, match="another memory"):
        momentum.load_state_dict(adam.state_dict())


DIAGONAL, LEARNED = (Preconditioned(preconditioner=name) for name in ("diagonal", "learned"))
FORMS = {**{name: memory for name, (memory, _) in PAIRS.items()}, "diagonal": DIAGONAL, "learned": LEARNED}


@pytest.mark.parametrize("memory", FORMS.values(), ids=FORMS)
def test_a_memory_without_a_write_reads_zero(memory):
    state = memory.init(torch.ones(3, 5))
    assert torch.equal(memory.read(state), torch.zeros(3, 5))
    rows = torch.func.vmap(memory.init)(torch.ones(2, 3, 5))
    assert torch.equal(torch.func.vmap(memory.read)(rows), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("memory", [AdamMemory((0.9, 0.999)), DIAGONAL], ids=["adam", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writes_are_counted_in_half_precision(memory, dtype):
    state = memory.init(torch.zeros(2, dtype=dtype))
    for _ in range(2100):
        state = memory.update(state, torch.full((2,), 0.1, dtype=dtype))
    assert state.step == 2100
    assert memory.read(state).dtype == dtype


@pytest.mark.parametrize("memory", FORMS.values(), ids=FORMS)
def test_gradients_of_another_dtype(memory):
    state, expected = memory.init(torch.ones(3, 5)), memory.init(torch.ones(3, 5))
    for grad in GRADS[:3].bfloat16():
        state, expected = memory.update(state, grad), memory.update(expected, grad.float())
    torch.testing.assert_close(memory.read(state).float(), memory.read(expected), rtol=0, atol=0)
