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
    "attention": 305,
    "deltanet": 235,
    "dla": 375,
    "gated_deltanet": 240,
    "linear_attention": 190,
    "mac": 955,
    "mag": 735,
    "mal": 715,
    "memora": 430,
    "moneta": 505,
    "oja": 235,
    "retnet": 210,
    "self_modifying_titans": 280,
    "sliding_window_attention": 325,
    "titans": 375,
    "ttt_linear": 245,
    "ttt_mlp": 350,
    "yaad": 435,
}
REST = 60  # embedding, final norm, head, checks, the cache's counts


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
