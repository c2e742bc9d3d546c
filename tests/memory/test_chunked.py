"""The chunk algebra against the generic step: values, every gradient, second derivatives.

Both are checked against an independent oracle in tests/layers; here is asserted that its cases reach both.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nested_learning.layers import SelfModifyingTitans, Titans
from nested_learning.memory import engine, engines
from nested_learning.memory.engines import chunked
from nested_learning.memory.engines.chunked import scratch
from tests.layers import test_memory_layer_vs_oracle as oracle
from tests.memory.chunk_results import TOLERANCE, assert_same, batch, build, outputs, random_like, results


@pytest.fixture
def chunked_runs(monkeypatch):
    """A list that grows by the number of tokens of each run."""
    runs: list[int] = []
    run = chunked.run_chunks

    def spy(system, initial, state, inputs, how):
        runs.append(inputs.paths["k"].shape[2])
        return run(system, initial, state, inputs, how)

    monkeypatch.setattr(chunked, "run_chunks", spy)
    return runs


@pytest.fixture
def generic(monkeypatch):
    """A function that calls another with the chunk algebra switched off."""

    def call(f, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "choose", lambda *_: engines.generic)
            return f(*args, **kwargs)

    return call


SHAPES = [
    # rows, tokens, options: heads, widths and chunks that no implementation detail would favour
    (3, 12, {}),
    (2, 13, {"adaptive_q": True}),
    (2, 8, {"expansion": 2.0}),
    (2, 9, {"expansion": 0.5, "adaptive_q": True, "chunk_size": 3}),
    (1, 6, {"num_heads": 1, "chunk_size": 1}),
    (2, 40, {"chunk_size": 20, "conv_size": 0}),
    (2, 17, {"chunk_size": 17, "eta_max": 1.0, "adaptive_q": True}),
    (1, 96, {"hidden_size": 64, "chunk_size": 32}),
    (2, 13, {"eta_max": 2.0}),
    (2, 13, {"eta_max": 2.0, "projection_eta_max": 0.0, "expansion": 2.0}),
    (2, 17, {"projection_eta_max": 0.1, "adaptive_q": True}),
    (2, 40, {"eta_max": 1.9, "projection_eta_max": 0.3, "chunk_size": 20}),
    (3, 12, {"kind": Titans}),
    (2, 13, {"kind": Titans, "expansion": 2.0}),
    (2, 9, {"kind": Titans, "expansion": 0.5, "chunk_size": 3, "momentum_scaled": False}),
    (1, 6, {"kind": Titans, "num_heads": 1, "chunk_size": 1}),
    (1, 40, {"kind": Titans, "hidden_size": 64, "chunk_size": 20, "conv_size": 0}),
]
KINDS = pytest.mark.parametrize("kind", [SelfModifyingTitans, Titans])


@pytest.mark.parametrize(("rows", "tokens", "options"), SHAPES)
def test_equals_the_generic_step(rows, tokens, options, chunked_runs, generic):
    layer = build(**options)
    x = batch(layer, rows, tokens)
    expected = generic(results, layer, x)
    assert not chunked_runs
    actual = results(layer, x)
    size = layer.system.chunk_size
    assert chunked_runs == [tokens // size * size]
    assert_same(actual, expected)


@pytest.mark.parametrize("options", [{}, {"adaptive": "kvq", "expansion": 2.0}], ids=str)
def test_equals_the_oracle(options, chunked_runs):
    oracle.compare(oracle.Case(tokens=11, **options))
    assert chunked_runs == [8]


@pytest.mark.parametrize("scaled", [True, False])
def test_titans_equals_the_oracle(scaled, chunked_runs):
    oracle.compare(oracle.Case(tokens=11, rule="gd", projection=None, momentum=True, momentum_scaled=scaled))
    assert chunked_runs == [8]


@pytest.mark.parametrize("bias", [-300.0, -60.0, 30.0])
@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        (SelfModifyingTitans, "eta"),
        (SelfModifyingTitans, "alpha"),
        *((Titans, g) for g in ("eta", "alpha", "mu")),
    ],
)
def test_saturated_gates(kind, gate, bias, generic):
    """Learning rates of zero, and retentions that underflow, have finite and equal gradients.

    Gradients of gates are differences of sums here, hence exact relative to the largest of them, not each.
    """
    layer = build(kind=kind)
    with torch.no_grad():
        layer.gates[gate].bias.fill_(bias)
    x = batch(layer, 2, 12)
    expected = generic(results, layer, x)
    actual = results(layer, x)
    gates = max(float(t.abs().max()) for name, t in expected.items() if "gates" in name)
    for name, reference in expected.items():
        scale = gates if "gates" in name else float(reference.abs().max())
        assert torch.isfinite(actual[name]).all(), name
        torch.testing.assert_close(actual[name], reference, rtol=0, atol=TOLERANCE * scale, msg=name)


@KINDS
def test_float32_is_as_accurate_as_the_generic_step(kind, generic):
    options = {"hidden_size": 64, "chunk_size": 16, "kind": kind}
    exact = build(**options)
    x = batch(exact, 2, 64)
    expected = results(exact, x)
    layer = build(dtype=torch.float32, **options)
    layer.load_state_dict({name: p.float() for name, p in exact.state_dict().items()})
    x = x.detach().float().requires_grad_()

    def worst(found: dict[str, Tensor]) -> float:
        errors = [(found[name] - t).abs().max() / t.abs().max() for name, t in expected.items()]
        return float(max(errors))

    assert worst(results(layer, x)) < 2 * worst(generic(results, layer, x)) + 1e-6


UNSUPPORTED = [
    {"momentum": True},
    {"rule": "dgd_literal"},
    {"rule": "gd"},
    {"read": "chunk"},
    {"projection_chunk_size": 2},
    {"kind": Titans, "momentum": False},
    {"kind": Titans, "rule": "dgd"},
    {"kind": Titans, "read": "chunk"},
]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
def test_other_systems_take_the_generic_step(options, chunked_runs):
    layer = build(**options)
    outputs(layer, batch(layer, 2, 8))
    assert not chunked_runs


@KINDS
def test_other_calls_take_the_generic_step(kind, chunked_runs):
    layer = build(kind=kind)
    x = batch(layer, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    layer(x, mask=mask)
    layer(x[:, :3])
    assert not chunked_runs
    _, state = layer(x)
    assert chunked_runs == [8]
    layer(x[:, :5], state=state)
    layer(x[:, :1], state=state)
    assert chunked_runs == [8]


@KINDS
def test_without_gradients(kind, chunked_runs):
    layer = build(kind=kind)
    x = batch(layer, 2, 13)
    with torch.no_grad():
        actual = outputs(layer, x)
    assert chunked_runs == [12]
    assert not any(t.requires_grad for t in actual.values())
    assert_same(actual, {name: t.detach() for name, t in outputs(layer, x).items()}, 0.0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@KINDS
def test_surprise(kind, mode, chunked_runs, generic):
    layer = build(kind=kind)
    x = batch(layer, 2, 13)
    with mode():
        expected = generic(layer, x, return_surprise=True)[2]
        actual = layer(x, return_surprise=True)[2]
    assert chunked_runs == [12]
    assert not actual.requires_grad
    assert_same({"surprise": actual}, {"surprise": expected})


@KINDS
def test_only_some_inputs_need_gradients(kind, generic):
    layer = build(kind=kind).requires_grad_(False)
    layer.initial["W2"].requires_grad_()
    x = batch(layer, 2, 8).detach()

    def slope() -> dict[str, Tensor]:
        return {"W2": torch.autograd.grad(layer(x)[0].square().sum(), layer.initial["W2"])[0]}

    assert_same(slope(), generic(slope))


@pytest.mark.parametrize("part", ["y", "W1 after", "W2 after"])
@KINDS
def test_only_some_outputs_are_used(kind, part, generic):
    layer = build(kind=kind, conv_size=0)
    x = batch(layer, 2, 8)

    def slopes() -> dict[str, Tensor]:
        total = outputs(layer, x)[part].square().sum()
        found = torch.autograd.grad(total, [x, layer.initial["W1"], layer.initial["W2"]])
        return dict(zip(("x", "W1", "W2"), found, strict=True))

    assert_same(slopes(), generic(slopes))


@KINDS
def test_backward_twice_leaves_everything_as_it_was(kind):
    """The backward pass works in buffers of its own: not in what was saved, nor in what comes in."""
    layer = build(kind=kind)
    x = batch(layer, 2, 8)
    out = list(outputs(layer, x).values())
    slopes = [random_like(t, 5) for t in out]
    before = [t.clone() for t in (*out, *slopes)]
    wanted = [x, *layer.parameters()]
    first = torch.autograd.grad(out, wanted, slopes, retain_graph=True)
    second = torch.autograd.grad(out, wanted, slopes)
    for a, b in zip((*first, *before), (*second, *out, *slopes), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@KINDS
def test_one_row_and_one_head_share_no_memory_with_the_gradients_that_come_in(kind):
    """With B = 1 a transposed tensor can be contiguous already, and in-place work would go through it."""
    layer = build(kind=kind, num_heads=1)
    x = batch(layer, 1, 8)
    out = outputs(layer, x)
    slopes = [random_like(t, 5) for t in out.values()]
    before = [t.clone() for t in slopes]
    torch.autograd.grad(list(out.values()), x, slopes)
    for a, b in zip(slopes, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [pytest.param(SelfModifyingTitans, marks=pytest.mark.slow), Titans])
def test_second_derivatives_by_finite_differences(kind, chunked_runs):
    layer = build(kind=kind, hidden_size=4, chunk_size=2, conv_size=0)
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
        given = {**parameters, "initial.W1": W1, "initial.W2": W2}
        return torch.func.functional_call(layer, given, (x,))[0]

    inputs = (batch(layer, 1, 4), *(layer.initial[name].detach().requires_grad_() for name in ("W1", "W2")))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert chunked_runs


@KINDS
def test_second_derivatives_equal_the_generic_ones(kind, chunked_runs, generic):
    layer = build(kind=kind)
    x = batch(layer, 2, 8)
    leaves = [x, *layer.parameters()]

    def penalty() -> dict[str, Tensor]:
        slopes = torch.autograd.grad(layer(x)[0].square().sum(), leaves, create_graph=True)
        found = torch.autograd.grad(sum(g.square().sum() for g in slopes), leaves)
        return {str(i): g for i, g in enumerate(found)}

    actual = penalty()
    assert chunked_runs == [8]
    assert_same(actual, generic(penalty), 1e-10)


@KINDS
def test_under_checkpointing(kind, generic):
    layer = build(kind=kind)
    x = batch(layer, 2, 8)

    def slope(run) -> dict[str, Tensor]:
        return {"x": torch.autograd.grad(run(x).square().sum(), x)[0]}

    kept = slope(lambda x: layer(x)[0])
    assert_same(slope(lambda x: checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)), kept, 0.0)


@KINDS
def test_functional_transforms_take_the_generic_step(kind, chunked_runs):
    layer = build(kind=kind)
    x = batch(layer, 2, 8).detach()
    slope = torch.func.grad(lambda x: layer(x)[0].square().sum())(x)
    assert not chunked_runs
    leaf = x.clone().requires_grad_()
    layer(leaf)[0].square().sum().backward()
    assert chunked_runs == [8]
    assert_same({"x": slope}, {"x": leaf.grad})


@KINDS
def test_backward_inside_autocast(kind):
    """The memories stay in float32 where the whole step, the backward pass too, is inside autocast."""
    layer = build(dtype=torch.float32, kind=kind)
    x = batch(layer, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x)[0].float().square().sum()
        outside = torch.autograd.grad(loss, layer.initial["W1"], retain_graph=True)[0]
        loss.backward()
    torch.testing.assert_close(layer.initial["W1"].grad, outside)
    assert layer.initial["W1"].grad.dtype == torch.float32


LOW = pytest.mark.parametrize("options", [{}, {"adaptive_q": True, "expansion": 2.0}], ids=str)


@KINDS
@LOW
@pytest.mark.parametrize("how", ["module in bfloat16", "autocast"])
def test_factors_in_bfloat16(kind, options, how, chunked_runs):
    """Rounding the factors of products moves every output and gradient by its own size, and no further."""
    if kind is Titans:
        options = {"expansion": options.get("expansion", 1.0)}
    exact = build(hidden_size=32, kind=kind, dtype=torch.float32, chunk_size=8, **options)
    x = batch(exact, 3, 64, torch.float32)
    low = copy.deepcopy(exact)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = results(low, x)
    else:
        found = results(low.bfloat16(), x.detach().bfloat16().requires_grad_())
    expected = results(exact, x)
    assert chunked_runs == [64, 64]
    assert all(found[name].dtype == torch.float32 for name in found if name.endswith("after"))
    for name, value in expected.items():
        off = ((found[name].float() - value).norm() / value.norm()).item()
        # the gradient to a bias is a sum that nearly cancels
        assert 1e-5 < off < (0.25 if name.endswith("bias") else 0.04), (name, off)


@KINDS
def test_only_the_factors_are_rounded(kind, monkeypatch):
    """With float32 as the dtype of the factors the path by factors gives what the plain products give."""
    layer = build(kind=kind, dtype=torch.float32, hidden_size=32, chunk_size=8, expansion=2.0)
    x = batch(layer, 2, 24, torch.float32)
    expected = results(layer, x)
    monkeypatch.setattr(scratch.Scratch, "__init__", _always_by_factors)
    assert_same(results(layer, x), expected, 1e-5)


def _always_by_factors(self, dtype, operands=None, reuse=True):
    self._dtype, self._operands, self._reuse, self._buffers = dtype, dtype, reuse, {}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive_q": True, "expansion": 2.0},
        {"eta_max": 1.0},
        {"eta_max": 2.0},
        {"eta_max": 1.9, "projection_eta_max": 0.3},
        {"projection_eta_max": 0.0, "adaptive_q": True},
    ],
    ids=str,
)
def test_single_tokens_without_gradients(options, masked):
    """Generation takes a path of its own; with gradients a token goes through the generic step."""
    layer = build(**options)
    x = batch(layer, 3, 14).detach()
    mask = torch.ones(3, 14, dtype=torch.bool)
    if masked:
        mask[0, :2], mask[1, 5], mask[2, 3:] = False, False, False

    def stream() -> dict[str, Tensor]:
        state, found = None, {}
        for t in range(14):
            piece = slice(t, t + 1)
            y, state, surprise = layer(
                x[:, piece], state, mask[:, piece] if masked else None, return_surprise=True
            )
            found |= {f"y {t}": y.detach(), f"surprise {t}": surprise}
        tensors = {name: t.detach() for name, t in state.to_tensors().items()}
        return {**found, **tensors}

    with_gradients = stream()
    with torch.no_grad():
        without = stream()
    assert with_gradients.keys() == without.keys()
    for name, expected in with_gradients.items():
        torch.testing.assert_close(without[name], expected, rtol=1e-12, atol=1e-12, msg=name)
