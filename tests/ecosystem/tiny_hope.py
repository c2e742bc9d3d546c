"""Small Hope models in float64: one per mixer, hybrids, and one per way in which a CMS learns."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from nested_learning import HopeConfig, HopeForCausalLM

VOCAB, TOKENS = 31, 13

# Small chunks, segments and windows, so that a dozen tokens cross several boundaries.
MIXERS = {
    "attention": {"num_kv_heads": 1},
    "sliding_window_attention": {"window": 4},
    "memory": {"parts": {"architecture": "swiglu", "objective": "huber", "momentum": True, "chunk_size": 4}},
    "self_modifying_titans": {"chunk_size": 4, "projection_chunk_size": 8},
    "mag": {"window": 4, "persistent_tokens": 2, "memory_options": {"chunk_size": 4}},
    "mal": {"window": 4, "persistent_tokens": 2, "memory_options": {"chunk_size": 4}},
    "mac": {"segment": 4, "persistent_tokens": 2},
    "linear_attention": {"chunk_size": 4},
    "retnet": {"chunk_size": 4},
    "deltanet": {"chunk_size": 4},
    "gated_deltanet": {"chunk_size": 4},
    "oja": {"chunk_size": 4},
    "ttt_linear": {"chunk_size": 4},
    "ttt_mlp": {"chunk_size": 4},
    "dla": {"chunk_size": 4},
    "titans": {"chunk_size": 4},
    "moneta": {"chunk_size": 4},
    "yaad": {"chunk_size": 4},
    "memora": {"chunk_size": 4},
}
LEARNING = {
    "regression": {"cms_update": "regression"},
    "regression dgd": {"cms_update": "regression", "cms_levels": [{"chunk_size": 2, "rule": "dgd"}]},
    "regression nested": {"cms_update": "regression", "cms_variant": "nested"},
    "regression nested exact": {
        "cms_update": "regression",
        "cms_variant": "nested",
        "cms_nested_gradient": "exact",
    },
    "regression independent": {"cms_update": "regression", "cms_variant": "independent"},
    "lm": {"cms_update": "lm"},
    "lm learned rates": {
        "cms_update": "lm",
        "cms_levels": [
            {"chunk_size": 2, "learn_lr": True, "retention": 0.9},
            {"chunk_size": 4, "lr": 0.2, "rule": "momentum"},
        ],
    },
    "lm nested": {"cms_update": "lm", "cms_variant": "nested"},
    "lm independent": {"cms_update": "lm", "cms_variant": "independent"},
    "lm exact": {"cms_update": "lm", "cms_meta_gradient": "exact"},
}
CASES = [*MIXERS, "hybrid", *LEARNING]


# One for each way in which weights are read: gates that memories generate, gates from the input, recall,
# attention, fast weights in one block after the other and in the whole model.
FAST = ("self_modifying_titans", "titans", "mac", "attention", "regression nested exact", "lm")


def slow_but(fast: Iterable[str] = FAST, cases: Iterable[str] = CASES) -> list[Any]:
    """The cases as parameters of a test, those that are not `fast` marked slow."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (case not in fast)) for case in cases]


def hope(case: str, seed: int = 0, **overrides) -> HopeForCausalLM:
    """The model of one of `CASES`, of which no weight is zero."""
    mixers = ["deltanet"] if case in LEARNING else [case]
    if case == "hybrid":
        mixers = ["sliding_window_attention", "self_modifying_titans", "gated_deltanet"]
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": len(mixers),
        "num_heads": 2,
        "mixer": mixers,
        "mixer_options": {name: MIXERS[name] for name in mixers},
        "cms_levels": [{"chunk_size": 2}, {"chunk_size": 4}],
        "cms_activation": "swiglu" if case in LEARNING else "relu2",
        "cms_expansion": 2.0,
        **LEARNING.get(case, {}),
        **overrides,
    }
    torch.manual_seed(seed)
    model = HopeForCausalLM(HopeConfig(**fields)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "log_lr" not in name:
                p.add_(torch.randn_like(p), alpha=0.05)
    return model


def ids(rows: int = 2, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
