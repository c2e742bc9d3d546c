"""Calls of PyTorch's operators per layer and cached token, of every mixer: bounds that none may pass."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nested_learning import HopeForCausalLM, preset
from nested_learning.layers import MIXERS

# Calls of a block (norm, mixer, two static CMS levels) as the profiler counts them: views too, and operators
# that others are made of.
BOUNDS = {
    "attention": 295,
    "deltanet": 225,
    "dla": 365,
    "gated_deltanet": 230,
    "linear_attention": 180,
    "mac": 945,
    "mag": 725,
    "mal": 705,
    "memora": 420,
    "moneta": 495,
    "oja": 225,
    "retnet": 200,
    "self_modifying_titans": 280,
    "sliding_window_attention": 315,
    "titans": 365,
    "ttt_linear": 235,
    "ttt_mlp": 340,
    "yaad": 425,
}
REST = 50  # embedding, final norm, head, checks, the cache's counts


@torch.no_grad()
def calls(name: str, layers: int) -> int:
    """Operator calls of one token at context 41, within a chunk."""
    torch.manual_seed(0)
    options = {"window": 16} if name == "sliding_window_attention" else {}
    config = preset(
        "hope-tiny",
        mixer=name,
        hidden_size=64,
        num_heads=2,
        num_hidden_layers=layers,
        mixer_options={name: options},
    )
    model, ids = HopeForCausalLM(config).eval(), torch.randint(0, 256, (1, 40))
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, -1:], past_key_values=cache)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(ids[:, -1:], past_key_values=cache)
    return sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))


def test_every_mixer_has_a_bound():
    assert BOUNDS.keys() == MIXERS.keys() - {"memory"}


@pytest.mark.parametrize("name", BOUNDS)
def test_bound(name):
    one, two = calls(name, 1), calls(name, 2)
    assert two - one <= BOUNDS[name]
    assert 2 * one - two <= REST
