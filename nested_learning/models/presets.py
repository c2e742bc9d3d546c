"""Named configurations: functions that return a full `HopeConfig`, keywords override its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nested_learning.layers.registry import unknown
from nested_learning.models.hope.configuration_hope import HopeConfig

# Byte vocabulary: 256 bytes, end of text, padding.
BYTE_VOCAB_SIZE, END_OF_TEXT_ID, PAD_ID = 258, 256, 257

# hope-tiny's mixer has about 3.6·D² more parameters than attention; the MLPs of the two get them instead.
ATTENTION_EXPANSION = 5.8


def _tiny(**fields: Any) -> HopeConfig:
    base: dict[str, Any] = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "pad_token_id": PAD_ID,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "cms_levels": [{"chunk_size": 512}, {"chunk_size": 2048}],
    }
    return HopeConfig(**{**base, **fields})


def hope_tiny(**overrides: Any) -> HopeConfig:
    """About 1M parameters on bytes: self-modifying Titans with chunks of 32, two CMS levels."""
    options = {"self_modifying_titans": {"chunk_size": 32}}
    return _tiny(**{"mixer": "self_modifying_titans", "mixer_options": options, **overrides})


def hope_attention_tiny(**overrides: Any) -> HopeConfig:
    """hope-tiny with softmax attention as the mixer and wider MLPs, at the same number of parameters."""
    return _tiny(**{"mixer": "attention", "cms_expansion": ATTENTION_EXPANSION, **overrides})


def transformer_tiny(**overrides: Any) -> HopeConfig:
    """The Transformer of hope-tiny's size: attention and one MLP per block."""
    fields = {"mixer": "attention", "cms_levels": [{"chunk_size": 512}], "cms_expansion": ATTENTION_EXPANSION}
    return _tiny(**{**fields, **overrides})


def _paper(hidden_size: int, overrides: dict[str, Any]) -> HopeConfig:
    """The paper gives totals only; widths and depths are the usual ones, MLPs fill up to the total."""
    base: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": hidden_size,
        "num_hidden_layers": 24,
        "num_heads": hidden_size // 64,
        "mixer": "self_modifying_titans",
        "mixer_options": {"self_modifying_titans": {"chunk_size": 64}},
        "cms_levels": [{"chunk_size": 512}, {"chunk_size": 2048}],
        "cms_expansion": 3.5,
    }
    return HopeConfig(**{**base, **overrides})


def hope_340m(**overrides: Any) -> HopeConfig:
    """About 340M parameters in all (351M)."""
    return _paper(1024, overrides)


def hope_760m(**overrides: Any) -> HopeConfig:
    """About 760M parameters in all (753M)."""
    return _paper(1536, overrides)


def hope_1b3(**overrides: Any) -> HopeConfig:
    """About 1.3B parameters in all (1,306M)."""
    return _paper(2048, overrides)


PRESETS: dict[str, Callable[..., HopeConfig]] = {
    "hope-tiny": hope_tiny,
    "hope-attention-tiny": hope_attention_tiny,
    "transformer-tiny": transformer_tiny,
    "hope-340m": hope_340m,
    "hope-760m": hope_760m,
    "hope-1.3b": hope_1b3,
}


def preset(name: str, **overrides: Any) -> HopeConfig:
    """The configuration called `name`, with fields of `HopeConfig` overridden.

    Raises:
        ValueError: for an unknown name or field (with the nearest valid one), or values that do not fit.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name](**overrides)
