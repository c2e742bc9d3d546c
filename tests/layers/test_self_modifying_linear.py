"""SelfModifyingLinear against a token loop written from the equations, and what its users rely on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nested_learning.layers import SelfModifyingLinear
from nested_learning.layers.drop_in import LowRankMLPState, SelfModifyingLinearState

MODES = ["normalised", "literal"]
D_IN, D_OUT = 5, 3


def make(mode: str, dtype: torch.dtype = torch.float64, **options) -> SelfModifyingLinear:
    """A layer with all its parameters away from their starting values, so that it learns strongly."""
    torch.manual_seed(0)
    options = {"chunk_size": 4, "value_rank": 2, "eta_max": 0.7 if mode == "normalised" else 0.08, **options}
    layer = SelfModifyingLinear(D_IN, D_OUT, mode=mode, **options)
    with torch.no_grad():
        for parameter in (layer.value_up, layer.gates.weight):
            parameter.normal_()
        layer.gates.bias.copy_(torch.tensor([0.5, 1.5]))
        if layer.read_scale is not None:
            layer.read_scale.uniform_(0.5, 1.5)
    return layer.to(dtype)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_tokens(layer: SelfModifyingLinear, x: Tensor, W: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One row [T, in], token by token, on the weights W_t themselves: y [T, out] and W_T."""
    p = dict(layer.named_parameters())
    W0, U, V = p["weight"], p["value_up"], p["value_down"]
    W = W0 if W is None else W
    outputs = []
    for x_t in x:
        y = W @ x_t
        if layer.mode == "literal":
            y = W0 @ x_t + p["read_scale"] * (y - W0 @ x_t)
        outputs.append(y + p["bias"] if "bias" in p else y)
        z = x_t / (x_t.square().sum() + 1e-6).sqrt() if layer.mode == "normalised" else x_t
        eta_logit, alpha_logit = p["gates.weight"] @ z + p["gates.bias"]
        eta, alpha = layer.eta_max * eta_logit.sigmoid(), alpha_logit.sigmoid()
        target = W0 @ (z + U @ (V @ z))
        if layer.mode == "normalised":
            eta = eta / (1 + eta * (z @ z))
            W = W0 + alpha * (W - W0) - eta * torch.outer(W @ z - target, z)
        else:
            erased = W @ (alpha * torch.eye(len(z), dtype=z.dtype) - eta * torch.outer(z, z))
            W = erased - eta * torch.outer(W @ z - target, z)
    return torch.stack(outputs), W


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T", [1, 4, 11])
def test_equals_the_token_loop_in_outputs_state_and_all_gradients(mode, bias, T):
    layer, x = make(mode, bias=bias), inputs(2, T, D_IN).requires_grad_()
    start = 0.3 * inputs(2, D_OUT, D_IN).requires_grad_()
    y, state = layer(x, SelfModifyingLinearState(start))
    expected = [by_tokens(layer, row, layer.weight + d) for row, d in zip(x, start, strict=True)]
    y_loop, delta_loop = (torch.stack(parts) for parts in zip(*expected, strict=True))
    delta_loop = delta_loop - layer.weight
    torch.testing.assert_close(y, y_loop, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(state.delta, delta_loop, atol=1e-12, rtol=1e-10)

    seeds = inputs(*y.shape), inputs(*state.delta.shape)
    leaves = {"x": x, "start": start, **dict(layer.named_parameters())}
    got, wanted = (
        torch.autograd.grad(outputs, list(leaves.values()), seeds)
        for outputs in ((y, state.delta), (y_loop, delta_loop))
    )
    for name, a, b in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert a.abs().max() > 1e-6, name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(mode):
    layer = make(mode)

    def run(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        y, state = layer(x, SelfModifyingLinearState(delta))
        return y, state.delta

    x, delta = inputs(2, 5, D_IN).requires_grad_(), inputs(2, D_OUT, D_IN).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, delta))


def test_the_normalised_rate_solves_the_proximal_problem():
    """Eq 56 for the input z, without decay: W_t = argmin ⟨W z, −t⟩ + ½‖W z‖² + (1/2η)‖W − W_{t−1}‖²."""
    layer = make("normalised")
    with torch.no_grad():
        layer.gates.bias[1] = 60.0  # α = 1
        layer.gates.weight.zero_()
    x = inputs(1, 1, D_IN)
    _, state = layer(x)
    W = (layer.weight + state.delta[0]).detach().requires_grad_()
    z = (x[0, 0] / (x.square().sum() + 1e-6).sqrt()).detach()
    target = layer.weight @ (z + layer.value_up @ (layer.value_down @ z))
    eta = layer.eta_max * layer.gates.bias[0].sigmoid()
    proximal = -(W @ z) @ target + 0.5 * (W @ z).square().sum()
    proximal = proximal + (W - layer.weight).square().sum() / (2 * eta)
    (gradient,) = torch.autograd.grad(proximal, W)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 64])
def test_the_chunk_length_does_not_change_the_result(mode, chunk_size):
    x = inputs(2, 12, D_IN)
    y, state = make(mode, chunk_size=5)(x)
    z, other = make(mode, chunk_size=chunk_size)(x)
    torch.testing.assert_close(z, y, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(other.delta, state.delta, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_pieces_and_single_tokens_equal_the_whole(mode):
    layer, x = make(mode), inputs(2, 11, D_IN)
    y, state = layer(x)
    carried, pieces = None, []
    for piece in (x[:, :3], x[:, 3:4], x[:, 4:9]):
        out, carried = layer(piece, carried)
        pieces.append(out)
    for t in (9, 10):
        out, carried = layer(x[:, t], carried)  # [B, in]
        assert out.shape == (2, D_OUT)
        pieces.append(out.unsqueeze(1))
    torch.testing.assert_close(torch.cat(pieces, 1), y, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(carried.delta, state.delta, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_padding_anywhere_changes_nothing_and_rows_are_independent(mode):
    layer, x = make(mode), inputs(2, 9, D_IN)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    padded = x.masked_fill(~mask.unsqueeze(-1), math.nan)  # whatever stands there
    y, state = layer(padded, mask=mask)
    assert torch.equal(y[~mask], torch.zeros(int((~mask).sum()), D_OUT, dtype=torch.float64))
    for row in range(2):
        alone, alone_state = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(y[row, mask[row]], alone[0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(state.delta[row], alone_state.delta[0], atol=1e-12, rtol=1e-10)
    one, after = layer(x[:, 0], state, mask[:, 0])  # row 0 is padded, row 1 is not
    assert torch.equal(after.delta[0], state.delta[0])
    assert not torch.equal(after.delta[1], state.delta[1])
    assert torch.equal(one[0], torch.zeros(D_OUT, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_a_token_is_read_before_it_is_learned(mode):
    layer, x = make(mode), inputs(1, 8, D_IN)
    y, _ = layer(x)
    first = nn.functional.linear(x[:, 0], layer.weight, layer.bias)
    torch.testing.assert_close(y[:, 0], first, atol=1e-14, rtol=0)
    changed = x.clone()
    changed[:, 5] += 1
    z, _ = layer(changed)
    assert torch.equal(z[:, :5], y[:, :5])
    assert (z - y)[:, 5:].abs().amax(-1).gt(1e-6).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_exactly_as_the_linear_layer_and_can_learn(mode, dtype):
    torch.manual_seed(0)
    layer, x = SelfModifyingLinear(D_IN, D_OUT, mode=mode).to(dtype), inputs(2, 70, D_IN).to(dtype)
    y, _ = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    y.float().square().mean().backward()
    opened = layer.value_up if mode == "normalised" else layer.read_scale
    assert opened.grad.abs().max() > 1e-5


def test_normalised_learning_does_not_depend_on_the_input_scale():
    """Scaling x scales the read and nothing else, so no input norm makes the memory diverge."""
    layer, x = make("normalised", bias=False), 10 * inputs(1, 200, D_IN)
    y, state = layer(x)
    z, other = layer(1e4 * x)
    torch.testing.assert_close(z, 1e4 * y, atol=0, rtol=1e-5)  # up to the floor of the normalisation
    torch.testing.assert_close(other.delta, state.delta, atol=1e-6, rtol=1e-5)


def test_normalised_memory_answers_a_repeated_input_with_its_target():
    layer = make("normalised")
    with torch.no_grad():
        layer.gates.bias[1] = 60.0  # α = 1
    x = inputs(1, 1, D_IN)
    _, state = layer(x.expand(1, 200, D_IN))
    answer = (layer.weight + state.delta[0]) @ x[0, 0]
    value = x[0, 0] + layer.value_up @ (layer.value_down @ x[0, 0])
    torch.testing.assert_close(answer, layer.weight @ value, atol=1e-8, rtol=1e-8)


def test_long_sequences_keep_a_bounded_state_and_gradient():
    """4,096 tokens of a strong learner: the retention and the erase keep both from growing with T."""
    norms = {}
    for T in (256, 4096):
        layer, x = make("normalised", torch.float32, chunk_size=64), inputs(1, T, D_IN).float()
        y, state = layer(x)
        loss = y.square().mean()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        norms[T] = state.delta.norm(), torch.cat([g.flatten() for g in gradients]).norm()
    for short, long in zip(norms[256], norms[4096], strict=True):
        assert long < 2 * short


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["module in bfloat16", "autocast"])
def test_the_state_stays_float32_under_bfloat16(mode, how):
    layer, x = make(mode, torch.float32), inputs(2, 9, D_IN).float()
    expected, _ = layer(x)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(x)
    else:
        y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.delta.dtype == torch.float32
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


def test_the_state_does_not_follow_the_optimizer_and_moves_between_precisions():
    layer, x = make("normalised", torch.float32), inputs(2, 9, D_IN).float()
    with torch.no_grad():
        _, state = layer(x[:, :5])
        before = state.clone()
        expected, _ = layer(x[:, 5:], state)
        y, after = layer.double()(x[:, 5:].double(), state)
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert torch.equal(before.delta, state.delta)
    assert after.delta.dtype == torch.float64
    torch.testing.assert_close(y.float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "literral"}, "unknown mode 'literral'. Did you mean 'literal'"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"value_rank": True}, "value_rank must be a positive integer, got True"),
        ({"eta_max": 0.0}, "eta_max must be a positive number, got 0.0"),
        ({"eta_max": math.nan}, "eta_max must be a positive number, got nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfModifyingLinear(D_IN, D_OUT, **options)


@pytest.mark.parametrize(
    ("x", "state", "mask", "message"),
    [
        ((2, 3, 4), None, None, r"x must be \[B, T >= 1, 5\].*got \(2, 3, 4\)"),
        ((5,), None, None, r"got \(5,\)"),
        ((2, 0, 5), None, None, r"got \(2, 0, 5\)"),
        ((2, 3, 5), None, torch.ones(2, 3), r"mask must be bool \(2, 3\).*got torch.float32 \(2, 3\)"),
        ((2, 5), None, torch.ones(2, 1, dtype=torch.bool), r"mask must be bool \(2,\).*got .*\(2, 1\)"),
        ((2, 3, 5), torch.zeros(3, 3, 5), None, r"state.delta must be \(2, 3, 5\).*got \(3, 3, 5\)"),
    ],
)
def test_bad_inputs_are_refused(x, state, mask, message):
    layer = SelfModifyingLinear(D_IN, D_OUT)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(x), None if state is None else SelfModifyingLinearState(state), mask)


def test_other_states_dtypes_and_devices_are_refused():
    layer = SelfModifyingLinear(D_IN, D_OUT)
    x = torch.zeros(2, D_IN)
    with pytest.raises(ValueError, match="must be a SelfModifyingLinearState, got LowRankMLPState"):
        layer(x, LowRankMLPState(torch.zeros(2, 1)))
    with pytest.raises(
        ValueError, match=r"x must be torch.float32 as the layer's weights are, got torch.float64"
    ):
        layer(x.double())
    with pytest.raises(ValueError, match=r"x must be torch.float32.*got torch.int64"):
        layer(x.long())
    with pytest.raises(ValueError, match="x is on meta, the layer on cpu"):
        layer(x.to("meta"))
