"""Chunks of the written-out algebra through torch.compile: their numbers, and how many graphs they take."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from nested_learning.layers import SelfModifyingTitans, Titans, set_compile_step
from nested_learning.memory.engines import compiler
from tests.graphs import counted

D = 8
FORMS = [
    partial(SelfModifyingTitans),
    partial(SelfModifyingTitans, adaptive_q=True, expansion=2.0),
    partial(Titans),
    partial(Titans, momentum_scaled=False),
]


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs; AOTAutograd runs them."""
    with counted(monkeypatch, compiler, aot_eager, _broken=False, _rows={}) as found:
        yield found


def build(form: partial[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return form(D, num_heads=2, chunk_size=4).to(dtype)


def sequence(tokens: int, rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(tokens)
    return torch.randn(rows, tokens, D, dtype=dtype, requires_grad=True)


def results(layer: nn.Module, x: Tensor, mask: Tensor | None = None, compiled: bool = False) -> list[Tensor]:
    """Output, states and surprise of a sequence, and all gradients of the first two."""
    set_compile_step(layer, compiled)
    y, state, surprise = layer(x, mask=mask, return_surprise=True)
    values = [y, *state.current.values(), *(state.momentum or {}).values()]
    total = sum(t.square().sum() for t in values)
    found = torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True, materialize_grads=True)
    return [*values, surprise, *found]


def assert_same(actual: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=relative * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form is FORMS[2] else pytest.mark.slow) for form in FORMS]
)
def test_nothing_changes_and_two_graphs_do(form, graphs):
    """One forward and one backward graph for every length, ragged or not, and for a second layer."""
    layer, second = build(form), build(form, seed=1)
    for tokens in (8, 12, 23):
        x = sequence(tokens)
        assert_same(results(layer, x, compiled=True), results(layer, x), 1e-10)
        assert len(graphs) == 2
    x = sequence(16)
    assert_same(results(second, x, compiled=True), results(second, x), 1e-10)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[1:3])
def test_one_row_padding_and_factors_in_bfloat16(form, graphs):
    layer = build(form)
    x = sequence(16, rows=1)
    assert_same(results(layer, x, compiled=True), results(layer, x), 1e-10)
    assert len(graphs) == 2
    x, mask = sequence(20), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :3] = mask[1, 18:] = False
    assert_same(results(layer, x, mask, compiled=True), results(layer, x, mask), 1e-10)
    layer, x = build(form, dtype=torch.float32), sequence(16, dtype=torch.float32)
    before = len(graphs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(layer, x, compiled=True), results(layer, x), 2e-2)
    assert len(graphs) == before + 2


@pytest.mark.slow
def test_without_gradients(graphs):
    """Less is computed: a graph of its own, also for the surprise, and with inference mode."""
    layer = build(FORMS[2])
    x = sequence(16)
    with torch.no_grad():
        expected = layer(x)[0]
        set_compile_step(layer, True)
        assert_same([layer(x)[0]], [expected], 1e-10)
        assert len(graphs) == 1
        layer(x[:, :4])
        assert len(graphs) == 1
    with torch.inference_mode():
        assert_same([layer(x)[0]], [expected], 1e-10)


def test_second_derivatives(graphs):
    layer = build(FORMS[2])
    x = sequence(8)
    found = []
    for compiled in (False, True):
        set_compile_step(layer, compiled)
        (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        assert len(graphs) == compiled  # the backward pass that is differentiated is the generic engine's
        found.append([g, *torch.autograd.grad(g.square().sum(), list(layer.parameters()), allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fails", [0, 1])
def test_one_warning_where_there_is_no_compiler(fails, monkeypatch):
    """Also where the first that fails is the backward pass."""
    calls = []

    def backend(graph, _):
        calls.append(graph)
        if len(calls) > fails:
            raise RuntimeError("no compiler here")
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(compiler, "BACKEND", backend)
    monkeypatch.setattr(compiler, "_broken", False)
    monkeypatch.setattr(compiler, "_rows", {})
    layer = build(FORMS[2])
    x = sequence(19)
    expected = results(layer, x)
    with pytest.warns(RuntimeWarning, match="no compiler here") as seen:
        actual = results(layer, x, compiled=True)
    assert len([w for w in seen if "no compiler here" in str(w.message)]) == 1
    assert_same(actual, expected, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(layer, x, compiled=True), expected, 1e-12)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[1:3])
def test_inductor(form, monkeypatch):
    monkeypatch.setattr(compiler, "_broken", False)
    monkeypatch.setattr(compiler, "_rows", {})
    layer, x = build(form, dtype=torch.float32), sequence(19, dtype=torch.float32)
    for a, b in zip(results(layer, x, compiled=True), results(layer, x), strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()
    assert not compiler._broken
