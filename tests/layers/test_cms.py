"""The continuum memory system: what its blocks compute, weights per row, and its options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nested_learning.layers import CMSLevel, ContinuumMemorySystem, MLPBlock

WIDTH = 6


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.double()


def by_hand(x, norm, up, down, gate=None, activation="relu2"):
    """The block for one token [D], written out."""
    h = norm * x / torch.sqrt((x * x).mean() + 1e-6)
    if activation == "swiglu":
        g = gate @ h
        hidden = g * torch.sigmoid(g) * (up @ h)
    elif activation == "relu2":
        hidden = torch.where(up @ h > 0, (up @ h) ** 2, 0)
    else:
        hidden = (up @ h) * 0.5 * (1 + torch.erf((up @ h) / 2**0.5))
    return x + down @ hidden


def weights_of(block):
    return {name: p.detach() for name, p in block.named_parameters()}


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_chain_equals_the_equations_by_hand(activation):
    cms = randomise(
        ContinuumMemorySystem(WIDTH, [{"chunk_size": 2}, {"chunk_size": 4}], activation=activation)
    )
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    y, state = cms(x)
    expected = x.clone()
    for block in cms.blocks:
        w = {name.removesuffix(".weight"): p for name, p in weights_of(block).items()}
        for b in range(2):
            for t in range(3):
                expected[b, t] = by_hand(expected[b, t], activation=activation, **w)
    assert state is None
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_one_level_is_the_transformers_mlp_with_its_residual(activation):
    cms = randomise(
        ContinuumMemorySystem(WIDTH, [{"chunk_size": 7, "intermediate_size": 10}], activation=activation)
    )
    (block,) = cms.blocks
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    h = F.rms_norm(x, (WIDTH,), block.norm.weight, 1e-6)
    up = h @ block.up.weight.T
    hidden = {
        "swiglu": lambda: F.silu(h @ block.gate.weight.T) * up,
        "gelu": lambda: F.gelu(up),
        "relu2": lambda: F.relu(up).square(),
    }[activation]()
    torch.testing.assert_close(cms(x)[0], x + hidden @ block.down.weight.T)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("per_row", [("up.weight", "down.weight"), ("norm.weight",), "all"])
def test_weights_per_row_equal_row_by_row_runs(activation, per_row):
    block = randomise(MLPBlock(WIDTH, 9, activation))
    rows = 3
    names = list(weights_of(block)) if per_row == "all" else per_row
    weights = {
        name: torch.randn(rows, *p.shape, dtype=p.dtype, requires_grad=True)
        for name, p in weights_of(block).items()
        if name in names
    }
    x = torch.randn(rows, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y = block(x, weights)

    expected = []
    for b in range(rows):
        own = {name.removesuffix(".weight"): p for name, p in block.named_parameters()}
        own.update({name.removesuffix(".weight"): w[b] for name, w in weights.items()})
        expected.append(torch.stack([by_hand(x[b, t], activation=activation, **own) for t in range(4)]))
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)

    probe = torch.randn_like(y)
    inputs = [x, *weights.values(), *(p for name, p in block.named_parameters() if name not in weights)]
    got = torch.autograd.grad((y * probe).sum(), inputs)
    want = torch.autograd.grad((expected * probe).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_shared_and_per_row_weights_mix_and_own_weights_are_the_default():
    block = randomise(MLPBlock(WIDTH, 9))
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    own = weights_of(block)
    torch.testing.assert_close(block(x, own), block(x))
    mixed = {"up.weight": own["up.weight"].expand(2, -1, -1), "down.weight": own["down.weight"]}
    torch.testing.assert_close(block(x, mixed), block(x))
    cms = ContinuumMemorySystem(WIDTH, [{"chunk_size": 1}, {"chunk_size": 2}]).double()
    y, _ = cms(x, weights=[None, weights_of(cms.blocks[1])])
    torch.testing.assert_close(y, cms(x)[0])


def test_weights_that_do_not_fit_are_refused():
    block = MLPBlock(WIDTH, 9)
    x = torch.randn(2, 4, WIDTH)
    with pytest.raises(ValueError, match=r"Did you mean 'up.weight'"):
        block(x, {"upp.weight": torch.zeros(9, WIDTH)})
    with pytest.raises(ValueError, match=r"\(3, 9, 6\); expected \(9, 6\), or \(2, 9, 6\)"):
        block(x, {"up.weight": torch.zeros(3, 9, WIDTH)})
    cms = ContinuumMemorySystem(WIDTH, [{"chunk_size": 1}])
    with pytest.raises(ValueError, match="one entry per level"):
        cms(x, weights=[None, None])


def test_norm_runs_in_float32_under_bfloat16():
    block = randomise(MLPBlock(64, 64)).float()
    x = torch.randn(1, 5, 64) * 300  # squares of which bfloat16 would round to 8 bits before the mean
    exact = block.norm(x.bfloat16().float())
    low = block.bfloat16().norm(x.bfloat16())
    reference = F.rms_norm(x.bfloat16().float(), (64,), block.norm.weight.float(), 1e-6).bfloat16()
    assert torch.equal(low, reference)
    torch.testing.assert_close(low.float(), exact, rtol=0.01, atol=0.01)


def test_info_and_the_split_of_the_width():
    levels = [{"chunk_size": 4}, {"chunk_size": 8, "expansion": 3.0, "activation": "swiglu"}]
    info = ContinuumMemorySystem(8, levels, expansion=4.0).info()
    assert info == [
        {
            "chunk_size": 4,
            "updates_per_token": 0.25,
            "parameters": 8 + 2 * 8 * 16,
            "intermediate_size": 16,
            "activation": "relu2",
        },
        {
            "chunk_size": 8,
            "updates_per_token": 0.125,
            "parameters": 8 + 3 * 8 * 24,
            "intermediate_size": 24,
            "activation": "swiglu",
        },
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_more_levels_do_not_add_matrix_parameters(count):
    levels = [{"chunk_size": 2**i} for i in range(count)]
    cms = ContinuumMemorySystem(16, levels)
    assert sum(p.numel() for p in cms.parameters() if p.ndim == 2) == 2 * 16 * 64


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([{}], "needs a chunk_size"),
        ([{"chunk_size": 0}], "positive integer, got 0"),
        ([{"chunk_size": -4}], "positive integer, got -4"),
        ([{"chunk_size": 2.0}], "positive integer, got 2.0"),
        ([{"chunk_size": True}], "positive integer, got True"),
        ([{"chunk_sise": 4}], "Did you mean 'chunk_size'"),
        ([{"chunk_size": 6}, {"chunk_size": 9}], "6 does not divide 9"),
        ([{"chunk_size": 8}, {"chunk_size": 4}], "8 does not divide 4"),
        ([{"chunk_size": 4, "expansion": -1.0}], "a CMS level must be a positive number, got -1"),
        (
            [{"chunk_size": 4, "expansion": "1"}],
            "expansion of a CMS level must be a positive number, got '1'",
        ),
        ([{"chunk_size": 4, "expansion": 0.01}], "no hidden unit at hidden_size 8"),
        ([{"chunk_size": 4, "expansion": 1.0, "intermediate_size": 8}], "not both"),
        ([{"chunk_size": 4, "intermediate_size": 0}], "intermediate_size of a CMS level"),
        ([{"chunk_size": 4, "activation": "relu"}], "Did you mean 'relu2'"),
        ({"chunk_size": 4}, "are a list"),
        ([512], "a CMS level is a dict"),
    ],
)
def test_bad_levels_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemorySystem(8, levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sequental"}, "Did you mean 'sequential'"),
        ({"update": "regresion"}, "Did you mean 'regression'"),
    ],
)
def test_variants_and_updates_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemorySystem(8, [CMSLevel(chunk_size=4)], **options)
