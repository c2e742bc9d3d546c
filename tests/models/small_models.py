"""Small Hope models, one per mixer that exists, and a hybrid."""

import torch
from torch import nn

import nested_learning.layers  # noqa: F401  (registers the mixers)
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers.registry import MIXERS

VOCAB = 31

# Small chunks and windows, so that a dozen tokens cross several boundaries.
OPTIONS = {
    "attention": {"num_kv_heads": 1},
    "sliding_window_attention": {"window": 4, "conv_size": 3},
    "self_modifying_titans": {"chunk_size": 4, "projection_chunk_size": 8},
    "titans": {"chunk_size": 4},
}
# Options of mixers that have no case of their own.
MORE_OPTIONS = {
    "mac": {"segment": 4, "persistent_tokens": 2},
    "mag": {"window": 4, "persistent_tokens": 2, "memory_options": {"chunk_size": 4}},
    "mal": {"window": 4, "persistent_tokens": 2, "memory_options": {"chunk_size": 4}},
    "gated_deltanet": {},
}
RECURRENT = [name for name in ("self_modifying_titans", "titans") if name in MIXERS]
HYBRID = ["sliding_window_attention", *RECURRENT[:1]]
CASES = {name: [name, name] for name in OPTIONS if name in MIXERS} | {"hybrid": HYBRID}


def small_config(mixers: list[str], **overrides) -> HopeConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": len(mixers),
        "num_heads": 2,
        "mixer": mixers,
        "mixer_options": {name: (OPTIONS | MORE_OPTIONS).get(name, {}) for name in set(mixers)},
        "cms_levels": [{"chunk_size": 2}, {"chunk_size": 8}],
        "cms_expansion": 2.0,
    }
    return HopeConfig(**{**fields, **overrides})


def small_model(mixers: list[str], seed: int = 0, **overrides) -> HopeForCausalLM:
    torch.manual_seed(seed)
    return HopeForCausalLM(small_config(mixers, **overrides)).double().eval()


def assert_equal_weights(found: nn.Module, expected: nn.Module) -> None:
    """The parameters and buffers of two models are equal bit by bit.

    Their answers may differ in the last bits: a product depends on where a weight lies in memory.
    """
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
