"""Rates up to 2: long sequences stay bounded and accurate at the largest rate, nothing is an expansion.

Against the oracles, with gradients: layers/test_memory_layer_vs_oracle.py and test_table_vs_oracle.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from nested_learning import HopeConfig
from nested_learning.layers import MIXERS

TOKENS = 4096
DGD = {"architecture": "matrix", "objective": "dot", "rule": "dgd", "gradient": "token", "eta_max": 2.0}
SLOW = {"eta_max": 2.0, "projection_eta_max": 0.2}
ROWS = [
    ("deltanet", {"eta_max": 2.0}),
    ("gated_deltanet", {"eta_max": 2.0}),
    ("oja", {"eta_max": 2.0}),
    ("titans", {"rule": "dgd", "momentum": False, "eta_max": 2.0}),
    ("self_modifying_titans", {"eta_max": 2.0}),
    ("self_modifying_titans", SLOW),
    ("memory", {"parts": DGD}),
]
LINEAR = [row for row in ROWS if row[0] in ("deltanet", "gated_deltanet", "oja", "memory")]


def build(name: str, options: dict, alpha: float | None = None) -> torch.nn.Module:
    """A layer whose rates are the largest, with retentions as they start or as given."""
    torch.manual_seed(0)
    sized = options if name == "memory" else {"chunk_size": 32, **options}
    layer = MIXERS[name](16, 2, **sized)
    with torch.no_grad():
        layer.gates["eta"].weight.zero_()
        layer.gates["eta"].bias.fill_(40.0)
        if alpha is not None and "alpha" in layer.gates:
            layer.gates["alpha"].weight.zero_()
            layer.gates["alpha"].bias.fill_(alpha)
    return layer.eval()


def tokens_of(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if kind == "two":  # as in the parity of binary strings
        return torch.randn(2, 16, generator=g)[torch.randint(0, 2, (1, TOKENS), generator=g)]
    return torch.randn(1, TOKENS, 16, generator=g)


def size(state) -> float:
    return max(float(W.double().norm(dim=(-2, -1)).max()) for W in state.current.values())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["two", "many"])
@pytest.mark.parametrize(("name", "options"), ROWS, ids=str)
def test_a_long_sequence_at_the_largest_rate(name, options, kind):
    """Finite, no larger than the writes, near float64: to the end where a memory is linear in its weights.

    What an MLP learns depends on its own weights, and errors grow from chunk to chunk there at large rates.
    """
    layer, x = build(name, options), tokens_of(kind)
    y, state = layer(x)
    exact, exact_state = layer.double()(x.double())
    layer.float()
    linear = (name, options) in LINEAR
    with torch.autocast("cpu", torch.bfloat16):
        low, low_state = layer(x)
    assert y.isfinite().all()
    assert low.isfinite().all()
    # Without retention what is written adds up as in a random walk; with it to 2 / (1 − α) at most.
    most = 4 * TOKENS**0.5 if name == "deltanet" else 40 if linear else 120
    assert max(map(size, (state, exact_state, low_state))) < most
    near = TOKENS if linear else 64
    assert (y - exact)[:, :near].norm() < 1e-2 * exact[:, :near].norm()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [-2.0, 2.0, 30.0])
@pytest.mark.parametrize(("name", "options"), LINEAR, ids=str)
def test_no_difference_grows(name, options, alpha):
    """Two memories that read the same tokens come no further apart, at any retention: one token again and
    again, which α I − η k kᵀ at η = 2 would drive apart as (2 − α)ⁿ."""
    layer = build(name, options, alpha).double()
    x = tokens_of("many").double()[:, :1].expand(1, 256, 16)
    apart = []
    for seed in (1, 2):
        initial = next(layer.initial.parameters())
        initial.copy_(torch.randn(initial.shape, generator=torch.Generator().manual_seed(seed)))
        apart.append((initial.clone(), layer(x)[1].current["W"].squeeze(0)))
    (before, after), (other_before, other_after) = apart
    distance = (before - other_before).norm(dim=(-2, -1))
    assert ((after - other_after).norm(dim=(-2, -1)) <= distance * (1 + 1e-9)).all()


def test_rates_of_one_and_below_are_what_they_were():
    """1 + α, at which a rate under DGD ends, lies above them."""
    for eta_max in (0.5, 1.0):
        assert not MIXERS["self_modifying_titans"](16, 2, eta_max=eta_max).system.capped
    assert MIXERS["self_modifying_titans"](16, 2, eta_max=1.5).system.capped
    assert not MIXERS["gated_deltanet"](16, 2, eta_max=2.0).system.capped  # α stands before the bracket


@torch.no_grad()
def test_still_memories_keep_their_weights_and_the_last_one_learns():
    layer = build("self_modifying_titans", {"eta_max": 2.0, "projection_eta_max": 0.0})
    for tokens in (1, 5, 64, 77):
        state = layer(tokens_of("many")[:, :tokens])[1]
        for name, W in state.current.items():
            assert torch.equal(W[0, :-1], layer.initial[name][:-1])
            assert not torch.equal(W[0, -1], layer.initial[name][-1])


def test_the_pace_of_all_changes_nothing():
    x = tokens_of("many")[:, :70]
    results = []
    for projection in (None, 0.5):
        layer = build("self_modifying_titans", {"projection_eta_max": projection})
        y, _ = layer(x)
        y.sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_options_are_kept(tmp_path):
    for mixer, options in (("self_modifying_titans", SLOW), ("oja", {"eta_max": 1.5})):
        config = HopeConfig(mixer=mixer, mixer_options={mixer: options})
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert loaded.mixer_options == {mixer: options}
        assert loaded.fingerprint() == config.fingerprint() != HopeConfig(mixer=mixer).fingerprint()
    mixer = "self_modifying_titans"
    same, spelled = ({"eta_max": 1.5}, {"eta_max": 1.5, "projection_eta_max": 1.5})
    first, second = (HopeConfig(mixer=mixer, mixer_options={mixer: o}).fingerprint() for o in (same, spelled))
    assert first == second
    with pytest.raises(ValueError, match=r"eta_max must lie in \(0, 2\], got 2.1"):
        HopeConfig(mixer=mixer, mixer_options={mixer: {"eta_max": 2.1}})
