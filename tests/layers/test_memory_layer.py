"""What users of a memory layer rely on, beyond the comparison with the oracle."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nested_learning.layers import SelfModifyingTitans, Titans

LAYERS = [
    pytest.param(SelfModifyingTitans, {}, id="self-modifying"),
    pytest.param(
        SelfModifyingTitans, {"momentum": True, "adaptive_q": True, "projection_chunk_size": 8}, id="all"
    ),
    pytest.param(Titans, {}, id="titans"),
]


def make(cls, options, dtype=torch.float64):
    torch.manual_seed(0)
    return cls(16, 2, chunk_size=4, **options).to(dtype), torch.randn(3, 11, 16, dtype=dtype)


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_rows_of_a_batch_are_independent(cls, options):
    layer, x = make(cls, options)
    y, state = layer(x)
    for row in range(3):
        alone, alone_state = layer(x[row : row + 1])
        torch.testing.assert_close(alone[0], y[row], rtol=0, atol=1e-12)
        whole = state.select_rows(torch.tensor([row]))
        for a, b in zip(alone_state.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_a_token_never_changes_earlier_outputs(cls, options):
    layer, x = make(cls, options)
    y, _ = layer(x)
    changed = x.clone()
    changed[:, 6] += 1
    z, _ = layer(changed)
    assert torch.equal(y[:, :6], z[:, :6])
    assert (y[:, 6:] - z[:, 6:]).abs().amax(-1).gt(1e-6).all()  # and is seen by every later one


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_the_meta_learned_initial_memories_get_gradients_through_the_writes(cls, options):
    """The last chunk's outputs depend on the initial memories only through the chunks' writes."""
    layer, x = make(cls, options)
    _, state = layer(x[:, :8])
    gradients = torch.autograd.grad(layer(x[:, 8:], state)[0].square().sum(), list(layer.initial.values()))
    for gradient in gradients:
        per_memory = gradient.abs().amax(dim=(1, 2, 3))  # [N]
        assert per_memory.gt(1e-9).all()


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_forward_writes_no_parameter_and_no_given_state(cls, options):
    layer, x = make(cls, options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    _, state = layer(x)
    copies = [t.clone() for t in state.tensors()]
    layer(x, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(copies, state.tensors(), strict=True))


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_a_state_does_not_follow_the_optimizer(cls, options):
    """Before the first boundary the anchors are the initial memories: as values, not as views of them."""
    layer, x = make(cls, options)
    with torch.no_grad():
        _, state = layer(x[:, :3])
        before = [t.clone() for t in state.tensors()]
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_a_state_moves_between_precisions(cls, options):
    layer, x = make(cls, options, torch.float32)
    _, state = layer(x[:, :6])
    expected, _ = layer(x[:, 6:], state)
    for piece in (x[:, 6:], x[:, 6:7]):
        y, after = layer.double()(piece.double(), state)
        assert y.dtype == after.current["W1"].dtype == torch.float64
        torch.testing.assert_close(y, expected[:, : piece.shape[1]].double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("cls", "options"), LAYERS)
@pytest.mark.parametrize("how", ["module in bfloat16", "autocast"])
def test_states_stay_float32_under_bfloat16(cls, options, how):
    layer, x = make(cls, options, torch.float32)
    expected, _ = layer(x)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(x)
            _, state = layer(x[:, :1], state)
    else:
        layer, x = layer.bfloat16(), x.bfloat16()
        y, state = layer(x)
        _, state = layer(x[:, :1], state)
    assert y.dtype == torch.bfloat16
    assert state.conv_tail is not None
    memories = [*state.anchor.values(), *state.current.values(), *(state.momentum or {}).values()]
    assert {t.dtype for t in [*memories, state.conv_tail]} == {torch.float32}
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_the_meta_device_gives_the_same_shapes(cls, options):
    """Sizes of states and outputs without memory or arithmetic."""
    layer, x = make(cls, options)
    y, state = layer(x)
    y_meta, state_meta = layer.to("meta")(x.to("meta"))
    assert y_meta.shape == y.shape
    assert [t.shape for t in state_meta.tensors()] == [t.shape for t in state.tensors()]


def test_a_surprising_token_is_a_surprise():
    """A key whose value is what the memory has learned surprises less than one whose value changed."""
    torch.manual_seed(0)
    layer = Titans(16, 1, chunk_size=1, conv_size=0, momentum=False, rule="dgd").double()
    pattern = torch.randn(4, 16, dtype=torch.float64)
    x = pattern.repeat(12, 1).unsqueeze(0)  # four tokens, over and over
    strange = x.clone()
    strange[0, -1] = torch.randn(16, dtype=torch.float64)
    usual = layer(x, return_surprise=True)[2][0]
    changed = layer(strange, return_surprise=True)[2][0]
    assert usual[-4:].mean() < 0.7 * usual[:4].mean()
    assert changed[-1] > 1.3 * usual[-1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfModifyingTitans(10, 4), "hidden_size=10 is not divisible by num_heads=4"),
        (lambda: SelfModifyingTitans(8, 2, chunk_size=6, projection_chunk_size=4), "must divide the other"),
        (lambda: SelfModifyingTitans(8, 2, chunk_size=0), "chunk_size must be a positive integer, got 0"),
        (lambda: SelfModifyingTitans(8, 2, rule="dgdd"), "Did you mean 'dgd'"),
        (lambda: SelfModifyingTitans(8, 2, read="tokens"), r"read must be one of \('token', 'chunk'\)"),  # type: ignore[arg-type]
        (lambda: SelfModifyingTitans(8, 2, expansion=0.01), "leaves no hidden unit"),
        (lambda: Titans(8, 2, conv_size=-1), "conv_size must be 0"),
        (lambda: Titans(8, 2, max_half_life=3.0), "max_half_life must be at least 38.2 tokens, got 3.0"),
        (lambda: Titans(8, 2, eta_max=0.0), r"eta_max must lie in \(0, 1\]"),
        (lambda: Titans(8, 2, eta_max=50.0), "an erase rate above 1 overshoots here"),
        (lambda: Titans(8, 2, momentum="no"), "momentum must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_calls():
    layer = Titans(8, 2, chunk_size=4)
    x = torch.randn(2, 3, 8)
    _, state = layer(x)
    other = SelfModifyingTitans(8, 2, chunk_size=4)
    for call, message in [
        (lambda: layer(x[..., :4]), r"x must be \[B, T >= 1, 8\]"),
        (lambda: layer(x[:, :0]), r"x must be \[B, T >= 1, 8\]"),
        (lambda: layer(x, mask=torch.ones(2, 3)), "mask must be bool"),
        (lambda: layer(x, mask=torch.ones(2, 4, dtype=torch.bool)), "mask must be bool"),
        (lambda: layer(x[:1], state), "state holds 2 rows, x has 1"),
        (lambda: other(x, state), "state.anchor has shapes .* belongs to a layer with other options"),
        (lambda: Titans(8, 2, chunk_size=4, momentum=False)(x, state), "state.momentum has shapes"),
        (lambda: Titans(8, 2, chunk_size=4, conv_size=0)(x, state), "state.conv_tail has shapes"),
        (lambda: layer(x, x), "state must be a MemoryState, got Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_half_lives_are_spread_over_the_heads():
    layer = SelfModifyingTitans(8, 4, max_half_life=1000.0)
    half_lives = -math.log(2) / torch.nn.functional.logsigmoid(layer.gates["alpha"].bias)  # type: ignore[arg-type]
    ratios = half_lives[1:] / half_lives[:-1]
    assert half_lives[0].item() == pytest.approx(38.2, abs=0.1)
    assert half_lives[-1].item() == pytest.approx(1000, rel=1e-3)
    torch.testing.assert_close(ratios, ratios[:1].expand(3), rtol=1e-3, atol=0)
    same = SelfModifyingTitans(8, 4)
    assert torch.equal(same.gates["alpha"].bias, torch.full((4,), 4.0))


def test_layers_can_be_copied_and_do_not_share_their_rules():
    layer = copy.deepcopy(Titans(8, 2))
    layer.system.rule.clear()  # type: ignore[attr-defined]
    assert Titans(8, 2).system.rule["W1"].objective.name == "l2"


def test_default_rates_are_stable_without_erase():
    """η·λ_max(Σ x xᵀ) < 2 must hold over a chunk of one repeated key when nothing is erased."""
    assert Titans(8, 2, chunk_size=64).system.eta_max == 4 / 64
    assert Titans(8, 2, chunk_size=4).system.eta_max == 0.5
    assert SelfModifyingTitans(8, 2, chunk_size=64).system.eta_max == 0.5
