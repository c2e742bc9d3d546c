"""Tiny Hope models in float64, and a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nested_learning import HopeConfig, HopeForCausalLM
from tests.training.conftest import blank_plots, drawn  # noqa: F401 - fixtures

VOCAB = 31


@pytest.fixture
def hope():
    """A function that makes a model of one block and width 8, with fields of its configuration overridden."""

    def make(mixer: Any = "self_modifying_titans", **fields: Any) -> HopeForCausalLM:
        torch.manual_seed(0)
        base = {
            "vocab_size": VOCAB,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "pad_token_id": None,
        }
        config = HopeConfig(**{**base, "mixer": mixer, "cms_levels": [{"chunk_size": 8}], **fields})
        model = HopeForCausalLM(config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "embed" in name or "gates" in name:
                    parameter.normal_()
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (27,), generator=torch.Generator().manual_seed(1))
