"""The chunked recurrence against the token loop: outputs, final state and every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_learning.ops import delta_rule

TOLERANCE = 1e-10  # relative to the largest entry of a tensor


def make_inputs(
    seed: int,
    T: int,
    d_out: int,
    d_in: int,
    lead: tuple[int, ...] = (2, 3),
    erase: bool = True,
    queries: bool = True,
    momentum: bool = False,
    initial_momentum: bool = False,
    write: bool = False,
    retained: bool = False,
) -> dict[str, Tensor]:
    """Random arguments whose leading dimensions broadcast: some are full, some 1, some absent."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    thin = tuple(1 if i == 0 else n for i, n in enumerate(lead))
    arguments = {
        "W0": normal(*lead, d_out, d_in),
        "x": torch.nn.functional.normalize(normal(*thin, T, d_in), dim=-1),
        "a": normal(*lead, T, d_out),
        "log_alpha": -0.3 * uniform(*thin, T),
    }
    if erase:
        arguments["erase"] = uniform(*lead[1:], T)
    if queries:
        arguments["q"] = normal(*lead, T, d_in)
    if momentum:
        arguments["log_mu"] = -uniform(*thin, T)
        if initial_momentum:
            arguments["S0"] = normal(d_out, d_in)
    if write:
        arguments["write"] = (uniform(*lead[1:], T) > 0.3).double()
    if retained:
        arguments["W_init"] = normal(*lead[1:], d_out, d_in)
    return arguments


def run_with_gradients(fn, arguments: dict[str, Tensor], **options: int) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    results = dict(zip(("o", "W", "S"), fn(**leaves, **options), strict=True))
    results = {name: tensor for name, tensor in results.items() if tensor is not None}
    g = torch.Generator().manual_seed(7)
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=g, dtype=tensor.dtype)).sum()
        for tensor in results.values()
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {f"gradient of {n}": x for n, x in zip(leaves, gradients, strict=True) if x is not None}
    return {**results, **named}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        scale = wanted.detach().abs().max().item() + 1e-30
        error = (actual[name] - wanted).detach().abs().max().item() / scale
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    T=st.integers(1, 13),
    d_out=st.integers(1, 4),
    d_in=st.integers(1, 4),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    chunk_size=st.integers(1, 15),
    flags=st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in ("erase", "queries", "momentum", "initial_momentum", "write", "retained")
        }
    ),
)
def test_chunked_equals_naive(seed, T, d_out, d_in, lead, chunk_size, flags):
    arguments = make_inputs(seed, T, d_out, d_in, lead, **flags)
    actual = run_with_gradients(delta_rule.chunked, arguments, chunk_size=chunk_size)
    assert_same(actual, run_with_gradients(delta_rule.naive, arguments))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    answered=st.booleans(),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("erase", "momentum", "initial_momentum", "write", "retained")}
    ),
)
def test_one_token_equals_naive(seed, lead, answered, flags):
    """Reads, final state and gradients; the product with the weights before may be given."""
    arguments = make_inputs(seed, 1, 3, 4, lead, **flags)

    def one_token(W0, x, a, log_alpha, q, erase=None, S0=None, log_mu=None, write=None, W_init=None):
        mu = None if log_mu is None else log_mu.exp()
        Wx = x @ W0.mT if answered else None
        token = delta_rule.OneToken(W0, x, a, log_alpha.exp(), erase, S0, mu, write, W_init, Wx)
        return token.read(q), *token.final()

    assert_same(run_with_gradients(one_token, arguments), run_with_gradients(delta_rule.naive, arguments))


@pytest.mark.parametrize("T", [63, 64, 130])
@pytest.mark.parametrize("momentum", [False, True])
def test_chunked_equals_naive_at_the_default_chunk(T, momentum):
    arguments = make_inputs(
        0, T, 8, 6, lead=(2,), momentum=momentum, initial_momentum=momentum, retained=True
    )
    assert_same(
        run_with_gradients(delta_rule.chunked, arguments), run_with_gradients(delta_rule.naive, arguments)
    )


def test_second_derivatives():
    arguments = make_inputs(1, 5, 2, 3, lead=(), momentum=True, retained=True)
    names, tensors = list(arguments), [t.requires_grad_() for t in arguments.values()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(delta_rule.chunked(**dict(zip(names, values, strict=True)), chunk_size=3))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("log_alpha", [-8.0, -200.0, float("-inf")])
def test_vanishing_retention_gives_finite_gradients(log_alpha):
    """exp before the mask overflows here, and inf * 0 would be NaN in the backward pass."""
    arguments = make_inputs(2, 40, 4, 4, lead=(2,))
    arguments = {name: tensor.float() for name, tensor in arguments.items()}
    arguments["log_alpha"] = torch.full((2, 40), log_alpha)
    results = run_with_gradients(delta_rule.chunked, arguments, chunk_size=20)
    assert all(tensor.isfinite().all() for tensor in results.values())
    naive = run_with_gradients(delta_rule.naive, arguments)
    torch.testing.assert_close(results["o"], naive["o"], atol=1e-5, rtol=1e-5)


def test_repeated_keys_stay_exact_in_float32():
    """The worst case of the triangular solve: one key over and over, with the largest stable rate."""
    x = torch.nn.functional.normalize(torch.ones(1, 128, 16), dim=-1)
    a = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(1, 128)
    arguments = {
        "W0": torch.zeros(1, 16, 16),
        "x": x,
        "a": a,
        "log_alpha": zeros,
        "erase": zeros + 1.0,
        "q": x,
    }
    got, _, _ = delta_rule.chunked(**arguments, chunk_size=64)
    # erase rate 1 with a unit key: W_t x is exactly the last write
    torch.testing.assert_close(got, a, atol=1e-5, rtol=1e-5)


def test_delta_rule_fixed_point():
    """A write at rate η towards t with erase rate η settles at W x = t (spec section 2)."""
    eta, target = 0.3, torch.tensor([1.0, -2.0], dtype=torch.float64)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64).expand(80, 2)
    T = torch.full((80,), eta, dtype=torch.float64)
    _, W, _ = delta_rule.chunked(torch.zeros(2, 2).double(), x, eta * target.expand(80, 2), 0 * T, erase=T)
    torch.testing.assert_close(W @ x[0], target, atol=1e-10, rtol=0)


def test_no_momentum_is_returned_without_decay_and_no_output_without_queries():
    arguments = make_inputs(3, 4, 2, 2, queries=False)
    o, _, S = delta_rule.chunked(**arguments)
    assert o is None
    assert S is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"S0": torch.zeros(2, 3)}, "S0 is given without log_mu"),
        ({"x": torch.zeros(4, 5)}, r"x must end in \[4, 3\], got \[4, 5\]"),
        ({"a": torch.zeros(3, 2)}, r"a must end in \[4, 2\], got \[3, 2\]"),
        ({"q": torch.zeros(5, 3)}, r"q must end in \[4, 3\]"),
        ({"x": torch.zeros(0, 3)}, "no tokens"),
        ({"log_alpha": torch.zeros(1)}, r"log_alpha must end in \[4\], got \[1\]"),
        ({"erase": torch.zeros(5)}, r"erase must end in \[4\]"),
        ({"W_init": torch.zeros(3, 2)}, r"W_init must end in \[2, 3\]"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "W0": torch.zeros(2, 3),
        "x": torch.zeros(4, 3),
        "a": torch.zeros(4, 2),
        "log_alpha": torch.zeros(4),
    }
    with pytest.raises(ValueError, match=message):
        delta_rule.chunked(**{**arguments, **change})
