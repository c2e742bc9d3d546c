"""Levels of transformers' models: whose attention has which cache, found whatever its names are."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BarkSemanticConfig,
    BarkSemanticModel,
    BertConfig,
    CTRLConfig,
    DogeConfig,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen3NextConfig,
)

from nested_learning.levels import levels
from tests.levels.parts import outline, passes

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
LLAMA = LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=2)


def test_llama_with_adamw():
    model = LlamaForCausalLM(LLAMA)
    system = levels(model, torch.optim.AdamW(model.parameters()))
    assert outline(system) == [
        ("∞ (non-parametric)", {"softmax attention": 0}),
        ("every optimizer step", {"AdamW: moments": 0}),
        (
            "every optimizer step",
            {
                "embedding": 32 * 16,
                "attention projections": 2 * (2 * 16 * 16 + 2 * 8 * 16),
                "MLPs": 2 * 3 * 16 * 24,
                "norms": 5 * 16,
                "head": 32 * 16,
            },
        ),
    ]
    assert system["attention projections"].needs == ("AdamW: moments",)
    assert passes(system, "conditioning on output") >= {
        ("softmax attention", weights) for weights in ("MLPs", "norms", "head")
    }
    assert ("softmax attention", "embedding") not in passes(system, "conditioning on output")
    assert passes(system, "backpropagation") == {("softmax attention", "attention projections")}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32),
        GPTNeoXConfig(**SMALL, intermediate_size=24),
        Phi3Config(**SMALL, intermediate_size=24, num_key_value_heads=2, pad_token_id=0),
        CTRLConfig(n_embd=16, n_layer=2, n_head=4, dff=24, vocab_size=32),
        DogeConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, keep_window_size=4, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_the_cache_of_any_attention_is_found(config):
    """Independent of names: the cache of a running model."""
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    system = levels(model)
    assert 5 * system["softmax attention"].state_bytes == held
    assert len(system["softmax attention"].where) == 2
    assert system.parameters == model.num_parameters()


def test_attention_with_a_window_and_without_a_cache():
    mistral = AutoModel.from_config(
        MistralConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, sliding_window=4)
    ).eval()
    with torch.no_grad():
        cache = mistral(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert levels(mistral)["softmax attention (window 4)"].state_bytes == held
    bert = AutoModel.from_config(BertConfig(**SMALL, intermediate_size=24))
    assert levels(bert)["softmax attention"].where == (
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    )
    mixed = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)
    assert len(levels(mixed)["softmax attention"].where) == 2


def test_attention_by_other_names():
    sizes = {"hidden_size": 16, "num_heads": 4, "num_layers": 2, "block_size": 16}
    bark = BarkSemanticModel(BarkSemanticConfig(input_vocab_size=32, output_vocab_size=32, **sizes)).eval()
    with torch.no_grad():
        cache = bark(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 5 * levels(bark)["softmax attention"].state_bytes == held
    funnel = FunnelConfig(vocab_size=32, block_sizes=[2], d_model=16, n_head=4, d_head=4, d_inner=24)
    with torch.device("meta"):  # it has no cache
        system = levels(FunnelModel(funnel))
    assert system["softmax attention"].where[:2] == (
        "encoder.blocks.0.0.attention",
        "encoder.blocks.0.1.attention",
    )


BOUNDED = {
    "mistral": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 24,
    },
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": 4, "num_experts": 2},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window_size": 4,
        "swa_head_dim": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "moe_intermediate_size": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_attention_whose_cache_is_bounded_in_one_of_two_layers(kind):
    sizes = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**sizes, **BOUNDED[kind]})).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    bounded, whole = (layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    system = levels(model)
    window = system["softmax attention (window 4)"]
    assert (window.state_bytes, window.state_per) == (bounded, "sequence")
    seen = "the tokens of its chunk of 4" if kind == "llama4_text" else "the last 4 tokens"
    assert window.context == f"{seen}, as keys and values"
    assert 9 * system["softmax attention"].state_bytes == whole


def test_a_configuration_per_layer_is_that_of_the_layer():
    config = MistralConfig(
        **SMALL, intermediate_size=24, sliding_window=None, per_layer_config={1: {"sliding_window": 4}}
    )
    with torch.device("meta"):
        system = levels(AutoModel.from_config(config))
    assert system["softmax attention"].where == ("layers.0.self_attn",)
    assert system["softmax attention (window 4)"].where == ("layers.1.self_attn",)


def test_linear_attention_is_not_taken_for_softmax_attention():
    config = Qwen3NextConfig(
        **SMALL,
        intermediate_size=24,
        num_key_value_heads=2,
        head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert levels(model)["softmax attention"].where == ("layers.1.self_attn",)
