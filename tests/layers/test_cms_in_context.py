"""The continuum memory system that learns from its input, against a loop over tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from nested_learning.layers import CMSState, ContinuumMemorySystem
from nested_learning.layers.cms.regression import summed_gradients
from tests.oracles import cms as oracle

WIDTH = 6
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
FOUR = [{"chunk_size": 2}, {"chunk_size": 4}, {"chunk_size": 8}, {"chunk_size": 24}]


def system(levels, variant="sequential", seed=0, **options) -> ContinuumMemorySystem:
    """In float64, every parameter random, widths of 4. "nested, exact" is a variant with its gradient."""
    torch.manual_seed(seed)
    variant, _, gradient = variant.partition(", ")
    if gradient:
        options["nested_gradient"] = gradient
    levels = [{"intermediate_size": 4, "lr": 0.3, **level} for level in levels]
    cms = ContinuumMemorySystem(WIDTH, levels, variant, "regression", **options).double()
    for name, parameter in cms.named_parameters():
        if "log_lr" not in name:
            nn.init.normal_(parameter, std=0.6)
    return cms


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def states_match(state: CMSState, levels, row: int) -> None:
    for level in levels:
        part = state.level(level.index)
        for name, W in level.W.items():
            torch.testing.assert_close(part.weights[name][row], W, **CLOSE)
            if level.nested:
                torch.testing.assert_close(part.initial[name][row], level.init[name], **CLOSE)


@pytest.mark.parametrize("variant", ["sequential", "nested", "nested, exact", "independent"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 24, 25, 53])
def test_four_levels_write_at_their_boundaries_what_the_loop_writes(variant, length):
    cms = system(FOUR, variant)
    x = tokens(2, length)
    y, state = cms(x)
    for row in range(2):
        expected, levels = oracle.run(cms, x[row])
        torch.testing.assert_close(y[row], expected, **CLOSE)
        states_match(state, levels, row)
        boundaries = [[t for t in range(1, length + 1) if t % size == 0] for size in (2, 4, 8, 24)]
        assert [level.writes for level in levels] == boundaries
    assert state.position.tolist() == [length % 24] * 2


@pytest.mark.parametrize("index", range(4))
def test_a_level_changes_at_no_other_token(index):
    """Token by token, its weights are the same objects' values until i ≡ 0 mod C."""
    cms = system(FOUR)
    x, state, before = tokens(1, 48), None, None
    for t in range(48):
        _, state = cms(x[:, t : t + 1], state)
        now = state.level(index).weights["down.weight"]
        if before is not None:
            moved = bool((now != before).any())
            assert moved == ((t + 1) % FOUR[index]["chunk_size"] == 0)
        before = now


RULES = [
    {"rule": "gd", "clip": 100.0},
    {"rule": "gd", "clip": 0.05, "retention": 0.7},
    {"rule": "momentum"},
    {"rule": "adam", "lr": 0.05, "retention": 0.5, "activation": "gelu"},  # no gradient is exactly 0
    {"learn_lr": True, "lr": 0.2},
    {"activation": "swiglu"},
    {"activation": "gelu", "retention": 0.0},
    {"rule": "dgd", "lr": 0.5},
    {"rule": "dgd", "retention": 0.9, "activation": "swiglu", "learn_lr": True},
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("variant", ["sequential", "nested", "nested, exact", "independent"])
def test_rules_and_all_gradients_equal_the_loops(options, variant):
    if options.get("rule") == "dgd" and variant.startswith("nested"):
        pytest.skip("refused")
    heads = [{"heads": 2}, {}] if variant == "independent" else [{}, {}]
    cms = system([{"chunk_size": 3, **options, **heads[0]}, {"chunk_size": 6, **options}], variant)
    x = tokens(1, 14).requires_grad_()
    learn = torch.tensor([[t not in (1, 7, 8) for t in range(14)]])
    y, state = cms(x, learn=learn)
    expected, levels = oracle.run(cms, x[0], learn[0].tolist())
    torch.testing.assert_close(y[0], expected, **CLOSE)
    states_match(state, levels, 0)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x, *cms.parameters()]
    got = torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True)
    want = torch.autograd.grad((expected * probe[0]).sum(), inputs, allow_unused=True)
    for (name, _), a, b in zip([("x", None), *cms.named_parameters()], got, want, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(
            a, b.expand_as(a), rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", ["sequential", "nested", "nested, exact", "independent"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_pieces_padding_and_rows(variant, data):
    """Rows of other lengths, padding anywhere, cut anywhere: each row is the row alone."""
    cms = system([{"rule": "momentum", **level} for level in FOUR[:3]], variant)
    T = data.draw(st.integers(3, 30))
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=3, max_size=3))
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=4)))
    x = tokens(3, T)
    state, outputs = None, []
    bounds = [0, *cuts, T]
    for start, stop in itertools.pairwise(bounds):
        y, state = cms(x[:, start:stop], state, mask=mask[:, start:stop])
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for row in range(3):
        keep = mask[row]
        if not keep.any():
            assert torch.equal(state.level(0).weights["up.weight"][row], cms.blocks[0].up.weight)
            continue
        alone, after = cms(x[row : row + 1, keep])
        torch.testing.assert_close(y[row, keep], alone[0], **CLOSE)
        for a, b in zip(state.select_rows(torch.tensor([row])).tensors(), after.tensors(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_the_exact_gradient_of_an_initial_state_is_the_slope_of_the_slow_chunks_loss():
    """By finite differences of the loss through all inner writes; the first-order one is another."""
    level = {"chunk_size": 2, "lr": 0.5, "clip": 0.7, "retention": 0.9, "rule": "momentum"}
    steps = {}
    for gradient in ("exact", "first_order"):
        cms = system([level, {"chunk_size": 8, "lr": 1e-6, "clip": 1e9}], f"nested, {gradient}")
        _, state = cms(tokens(1, 8))
        own = dict(cms.blocks[0].named_parameters())
        initial = state.level(0).initial
        steps[gradient] = {name: (own[name] - W[0]).detach() / 1e-6 for name, W in initial.items()}

    def loss(cms):
        """Of the first level over the slow chunk, by the loop."""
        level = oracle.OneLevel(cms, 0)
        for t, u in enumerate(tokens(1, 8)[0]):
            level.token(u, t + 1, True)
            if t == 6:
                level.slower = level.level.__class__(chunk_size=16)  # keep the losses past the boundary
        return float(sum(level.chunk_losses).detach())

    cms = system([level, {"chunk_size": 8, "lr": 1e-6, "clip": 1e9}], "nested")
    distance = {"exact": 0.0, "first_order": 0.0}
    for name in steps["exact"]:
        weight = cms.get_parameter(f"blocks.0.{name}")
        for place in itertools.product(*map(range, weight.shape)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[place] += sign * 1e-5
                ends.append(loss(cms))
                with torch.no_grad():
                    weight[place] -= sign * 1e-5
            slope = (ends[0] - ends[1]) / 2e-5
            for gradient, found in steps.items():
                distance[gradient] = max(distance[gradient], abs(float(found[name][place]) - slope))
    assert distance["exact"] < 1e-6
    assert distance["first_order"] > 1e-3


def test_states_of_the_other_gradient_are_refused():
    x = tokens(2, 3)
    exact, first_order = (system(FOUR[:2], f"nested, {gradient}") for gradient in ("exact", "first_order"))
    longer = system([FOUR[0], FOUR[2]], "nested, exact")
    for one, other in ((exact, first_order), (first_order, exact), (exact, longer)):
        with pytest.raises(ValueError, match="it belongs to another CMS"):
            one(x, other(x)[1])


def test_the_exact_gradient_without_autograd():
    cms = system(FOUR[:3], "nested, exact")
    x = tokens(2, 21)
    with torch.no_grad():
        found = cms(x)[0]
    torch.testing.assert_close(found, cms(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["sequential", "nested", "nested, exact", "independent"])
def test_derivatives_of_torch_func_and_forward_mode_are_autograds(variant):
    cms = system(FOUR[:3], variant)
    x, v = tokens(2, 11).requires_grad_(), tokens(2, 11, seed=2)
    y = cms(x)[0]
    (gradient,) = torch.autograd.grad(y, x, v)
    for transform in ("vjp", "vmap"):
        if transform == "vjp":
            (found,) = torch.func.vjp(lambda x: cms(x)[0], x.detach())[1](v)
        else:  # rows one by one, and the gradient of autograd through it
            outputs = torch.func.vmap(lambda x: cms(x.unsqueeze(0))[0].squeeze(0))(x)
            (found,) = torch.autograd.grad(outputs, x, v)
        torch.testing.assert_close(found, gradient, **CLOSE)
    _, along = torch.func.jvp(lambda x: cms(x)[0], (x.detach(),), (v,))
    with forward_ad.dual_level():
        dual = cms(forward_ad.make_dual(x.detach(), v))[0]
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along, **CLOSE)
    with torch.no_grad():
        slope = (cms(x + 1e-6 * v)[0] - cms(x - 1e-6 * v)[0]) / 2e-6
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_gradients_by_hand_are_autograds(activation):
    cms = system([{"chunk_size": 4}], activation=activation)
    weights = {
        n: p.expand(2, -1, -1).clone().requires_grad_()
        for n, p in cms.blocks[0].named_parameters()
        if p.dim() == 2
    }
    key, value = tokens(2, 5), tokens(2, 5, seed=2)
    write = torch.rand(2, 5) < 0.7
    scale = torch.rand(4, dtype=torch.float64)
    loss = 0
    for b in range(2):
        W = {n: w[b] for n, w in weights.items()}
        for t in range(5):
            phi = oracle.hidden(W, key[b, t], activation, None) * scale
            loss = loss + write[b, t] * (W["down.weight"] @ phi - value[b, t]).square().mean() / 2
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    got, *_ = summed_gradients(weights, key, value, activation, write, scale)
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, **CLOSE)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_learning_rate_zero_is_the_static_system_bit_for_bit(variant):
    cms = system([{"chunk_size": 2, "lr": 0.0}, {"chunk_size": 4, "lr": 0.0}], variant)
    sizes = [{"chunk_size": level.chunk_size, "intermediate_size": 4} for level in cms.levels]
    static = ContinuumMemorySystem(WIDTH, sizes, variant).double()
    static.load_state_dict(cms.state_dict())
    y, state = cms(tokens(2, 9))
    assert state is None
    assert torch.equal(y, static(tokens(2, 9))[0])


def test_nested_without_update_is_sequential():
    results = []
    for variant in ("sequential", "nested"):
        torch.manual_seed(0)
        results.append(ContinuumMemorySystem(WIDTH, FOUR, variant).double()(tokens(2, 9))[0])
    assert torch.equal(*results)


def test_independent_is_the_weighted_sum_of_its_blocks():
    torch.manual_seed(0)
    levels = [
        {"chunk_size": 2, "heads": 2, "intermediate_size": 4},
        {"chunk_size": 4, "intermediate_size": 5},
    ]
    cms = ContinuumMemorySystem(WIDTH, levels, "independent").double()
    x = tokens(2, 3)
    parts = [block(x, residual=False) for block in cms.blocks]
    torch.testing.assert_close(cms(x)[0], x + parts[0] + parts[1])
    with torch.no_grad():
        cms.head_weights[0].copy_(torch.tensor([0.5, -2.0]))
        cms.head_weights[1].fill_(3.0)
    block = cms.blocks[0]
    h = torch.relu(block.norm(x) @ block.up.weight.T).square()
    heads = [h[..., part] @ block.down.weight[:, part].T for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(cms(x)[0], x + 0.5 * heads[0] - 2 * heads[1] + 3 * parts[1])


def test_a_gradient_that_is_not_finite_writes_nothing():
    cms = system([{"chunk_size": 2}])
    x = tokens(2, 4)
    x[0, 1, 0] = torch.nan
    y, state = cms(x)
    for name, W in state.level(0).weights.items():
        assert torch.isfinite(W).all()
        expected, _ = cms(x[:1, 2:])
        torch.testing.assert_close(y[0, 2:], expected[0], **CLOSE)
        _, alone = cms(x[1:])
        torch.testing.assert_close(W[1], alone.level(0).weights[name][0], **CLOSE)


def test_float32_state_under_bfloat16():
    cms = system(FOUR[:2])
    x = tokens(2, 9)
    exact, _ = cms(x)
    y, state = cms.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in state.weights.values()} == {torch.float32}
    assert (y.double() - exact).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        ([{"chunk_size": 2, "lr": 0.1}], {}, "lr of a CMS level needs update 'regression' or 'lm'"),
        ([{"chunk_size": 2, "clip": 0.1}], {}, "clip of a CMS level needs update"),
        ([{"chunk_size": 2, "heads": 2}], {}, "heads of a CMS level belong to variant 'independent'"),
        (
            [{"chunk_size": 2, "heads": 5}],
            {"variant": "independent"},
            "must divide its hidden width 32, got 5",
        ),
        (
            [{"chunk_size": 2, "rule": "dgd"}],
            {"update": "regression", "variant": "nested"},
            "another variant",
        ),
        ([{"chunk_size": 2}], {"nested_gradient": "second"}, "nested_gradient of a CMS|Did you mean"),
        (
            [{"chunk_size": 2}],
            {"update": "regression", "nested_gradient": "exact"},
            "needs variant 'nested'.*got 'sequential' and 'regression'",
        ),
        (
            [{"chunk_size": 2}],
            {"update": "lm", "variant": "nested", "nested_gradient": "exact"},
            "would take another pass",
        ),
        ([{"chunk_size": 2, "rule": "sgd"}], {"update": "regression"}, "Did you mean 'gd'|expected one of"),
        (
            [{"chunk_size": 2, "lr": -1.0}],
            {"update": "regression"},
            "lr of a CMS level must be a number not neg",
        ),
        ([{"chunk_size": 2, "retention": 1.5}], {"update": "regression"}, "from 0 to 1, got 1.5"),
        ([{"chunk_size": 2, "clip": 0}], {"update": "regression"}, "clip of a CMS level must be a positive"),
        (
            [{"chunk_size": 2, "lr": 0, "learn_lr": True}],
            {"update": "regression"},
            "starts from a positive lr",
        ),
        ([{"chunk_size": 2, "learn_lr": 1.5}], {"update": "regression"}, "must be true or false, got 1.5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(levels, options, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemorySystem(8, levels, **options)


def test_tokens_and_masks_that_do_not_fit_are_refused():
    cms = system([*FOUR[:1], {"chunk_size": 4, "rule": "adam"}])
    x = tokens(2, 5)
    for wrong in (x[..., :3], x[0], x[:, :0], x[:, None]):
        with pytest.raises(ValueError, match=rf"x must be \[B, T >= 1, {WIDTH}\], got"):
            cms(wrong)
    for wrong in (x.float(), x.long()):
        with pytest.raises(ValueError, match=r"x must be torch\.float64 as the layer's weights are"):
            cms(wrong)
    for wrong in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5), torch.ones(2, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 5\)"):
            cms(x, mask=wrong)
        with pytest.raises(ValueError, match=r"learn must be bool \(2, 5\)"):
            cms(x, learn=wrong)


def test_states_and_weights_that_do_not_fit_are_refused():
    cms = system(FOUR[:2])
    x = tokens(2, 3)
    _, state = cms(x)
    with pytest.raises(ValueError, match="belongs to another batch"):
        cms(tokens(3, 1), state)
    with pytest.raises(ValueError, match="belongs to another batch or a CMS with other levels"):
        system(FOUR[:1])(x, state)
    with pytest.raises(ValueError, match="learns its blocks' weights itself"):
        cms(x, weights=[None, None])
    with pytest.raises(ValueError, match="takes no state"):
        ContinuumMemorySystem(WIDTH, FOUR).double()(x, state)


@pytest.mark.parametrize(
    ("mine", "other", "field"),
    [
        ({}, {"rule": "adam"}, "rule"),
        ({"rule": "adam"}, {}, "rule"),
        ({"rule": "momentum"}, {"rule": "adam"}, "rule"),
        ({"variant": "nested"}, {}, "initial"),
        ({}, {"variant": "nested"}, "initial"),
        ({"variant": "nested"}, {"variant": "nested", "rule": "adam"}, "rule"),
    ],
)
def test_states_of_another_rule_or_variant_are_refused(mine, other, field):
    def of(how):
        variant = how.get("variant", "sequential")
        return system([{**level, "rule": how.get("rule", "gd")} for level in FOUR[:2]], variant)

    x = tokens(2, 3)
    with pytest.raises(ValueError, match=rf"as its {field}; this CMS needs .*belongs to a CMS with other"):
        of(mine)(x, of(other)(x)[1])
    for how in (mine, other):
        of(how)(x, of(how)(x)[1])  # their own they take
