"""Tiny, randomly initialised models of many architectures of transformers, built from their config classes.

By kind, the settings that a config class needs beyond its own defaults. Widths of attention, experts and
recurrences are small; nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 61
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, **_TOKENS}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_expand": 2}

LLAMAS = """
    llama mistral qwen2 qwen3 gemma gemma2 phi olmo olmo2 olmo3 cohere cohere2 granite smollm3 nemotron
    exaone4 ernie4_5 seed_oss starcoder2 stablelm gpt_neox helium hunyuan_v1_dense arcee apertus ministral
    biogpt
"""
MIXTRALS = """
    mixtral qwen3_moe olmoe granitemoe phimoe ernie4_5_moe hunyuan_v1_moe flex_olmo minimax_m2
"""
DENSE = {name: {} for name in LLAMAS.split()} | {
    "gemma3_text": {"sliding_window": 12},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 2,
        "window_size": 12,
    },
    "gpt_bigcode": _GPT,
    "codegen": {**_GPT, "rotary_dim": 4, "n_head": 4, "num_attention_heads": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon": {"ffn_hidden_size": 24, "head_dim": None},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
}
FUSED = {name: {"partial_rotary_factor": 0.5} for name in ("phi3", "glm", "glm4")}
EXPERTS = {name: {**_EXPERTS} for name in MIXTRALS.split()} | {
    "gpt_oss": {**_EXPERTS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 20},
    "granitemoeshared": {**_EXPERTS, "shared_intermediate_size": 20},
    "jetmoe": {**_EXPERTS, "kv_channels": 8, "num_attention_heads": 2},
    "deepseek_v2": {**_EXPERTS, **_ROUTED, **_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_EXPERTS, **_ROUTED, **_MLA},
    "glm4_moe": {**_EXPERTS, **_ROUTED},
    "dots1": {**_EXPERTS, **_ROUTED},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
RECURRENT = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": {
        **_EXPERTS,
        **_LINEAR,
        "shared_expert_intermediate_size": 20,
        "partial_rotary_factor": 0.5,
    },
    "qwen3_5_text": _LINEAR,
    "olmo_hybrid": _LINEAR,
    "jamba": {
        **_EXPERTS,
        **_MAMBA,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_EXPERTS,
        **_MAMBA2,
        "shared_intermediate_size": 20,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 32},
    "zamba2": {**_MAMBA2, "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True, "adapter_rank": 4},
    "nemotron_h": {
        **_EXPERTS,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "use_mamba_kernels": False,
    },
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "n_groups": 1, "expand": 2},
    "falcon_mamba": {"state_size": 4},
}
OTHER = {
    "minimax": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 12},
    "rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "xlstm": {"num_heads": 2, "num_blocks": 2},
}
ALL = DENSE | FUSED | EXPERTS | RECURRENT | OTHER


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A model in evaluation mode whose weights are large enough for its predictions to differ."""
    settings = {key: value for key, value in {**_BASE, **ALL[name]}.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                parameter.normal_(std=0.2)
    return model.eval()
