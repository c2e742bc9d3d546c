"""Tiny, randomly initialised models of the supported families, 2 to 4 layers wide 16 to 32."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from nested_learning.training.data import byte_tokenizer

VOCAB = 61
_COMMON = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
_LLAMA = {**_COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}

CONFIGS = {
    "llama": lambda layers: LlamaConfig(**_LLAMA, num_hidden_layers=layers),
    "qwen2": lambda layers: Qwen2Config(**_LLAMA, num_hidden_layers=layers),
    "qwen3": lambda layers: Qwen3Config(**_LLAMA, num_hidden_layers=layers, head_dim=8),
    "mistral": lambda layers: MistralConfig(**_LLAMA, num_hidden_layers=layers, sliding_window=12),
    "gpt2": lambda layers: GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_head=2, n_layer=layers, n_positions=64, resid_pdrop=0.1
    ),
    "gpt_neox": lambda layers: GPTNeoXConfig(**_COMMON, intermediate_size=40, num_hidden_layers=layers),
    "opt": lambda layers: OPTConfig(
        **_COMMON, ffn_dim=40, num_hidden_layers=layers, word_embed_proj_dim=16, dropout=0.1
    ),
}


def tiny_model(family: str = "llama", layers: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A model in evaluation mode whose weights are large enough for its predictions to differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](layers), attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def byte_llama(width: int = 32, hidden: int = 64, layers: int = 2, **fields):
    """A Llama on bytes without special tokens of its own, in evaluation mode, and the tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **special, **fields)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer
