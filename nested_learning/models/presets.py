"""Named configurations: functions that return a full `HopeConfig`, keywords override its fields.

`mixer_options` are merged into the preset's, per mixer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nested_learning._errors import unknown
from nested_learning.layers.registry import MIXERS
from nested_learning.models.hope.configuration_hope import HopeConfig

# Byte vocabulary: 256 bytes, end of text, padding.
BYTE_VOCAB_SIZE, END_OF_TEXT_ID, PAD_ID = 258, 256, 257

# hope-tiny's mixer has about 3.6·D² more parameters than attention; the MLPs of the two get them instead.
ATTENTION_EXPANSION = 5.8


def _config(base: dict[str, Any], chunk_size: int, overrides: dict[str, Any]) -> HopeConfig:
    """`base` with overrides; mixers that take a chunk size get the preset's unless it is overridden.

    Options are merged per mixer, those of `base` too, and only the mixers in use have any.
    """
    fields = {**base, **overrides}
    given = overrides.get("mixer_options")
    if given is None:
        given = {}
    own_options: dict[str, dict[str, Any]] = base.get("mixer_options", {})
    mixers = [fields["mixer"]] if isinstance(fields["mixer"], str) else fields["mixer"]
    if isinstance(given, dict) and isinstance(mixers, (list, tuple)):  # else HopeConfig says what is wrong
        chunked = {
            m for m in mixers if m in MIXERS and "chunk_size" in inspect.signature(MIXERS[m]).parameters
        }
        options: dict[str, Any] = {mixer: {"chunk_size": chunk_size} for mixer in sorted(chunked)}
        used = {mixer: own for mixer, own in own_options.items() if mixer in mixers}
        for mixer, own in [*used.items(), *given.items()]:
            options[mixer] = {**options.get(mixer, {}), **own} if isinstance(own, dict) else own
        fields["mixer_options"] = options
    return HopeConfig(**fields)


def _tiny(overrides: dict[str, Any], **fields: Any) -> HopeConfig:
    base: dict[str, Any] = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "pad_token_id": PAD_ID,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "cms_levels": [{"chunk_size": 512}, {"chunk_size": 2048}],
    }
    return _config({**base, **fields}, 32, overrides)


def hope_tiny(**overrides: Any) -> HopeConfig:
    """About 1M parameters on bytes: self-modifying Titans with chunks of 32, two CMS levels."""
    return _tiny(overrides, mixer="self_modifying_titans")


def hope_attention_tiny(**overrides: Any) -> HopeConfig:
    """hope-tiny with softmax attention as the mixer and wider MLPs, at the same number of parameters."""
    return _tiny(overrides, mixer="attention", cms_expansion=ATTENTION_EXPANSION)


def transformer_tiny(**overrides: Any) -> HopeConfig:
    """The Transformer of hope-tiny's size: attention and one MLP per block."""
    levels = [{"chunk_size": 512}]
    return _tiny(overrides, mixer="attention", cms_levels=levels, cms_expansion=ATTENTION_EXPANSION)


def _small(overrides: dict[str, Any], **fields: Any) -> HopeConfig:
    """hope-tiny's or transformer-tiny's layers at twice the width, for a BPE of 4,096 ids."""
    return _tiny(overrides, **{"vocab_size": 4096, "pad_token_id": 1, "hidden_size": 256, **fields})


def hope_small(**overrides: Any) -> HopeConfig:
    """About 5M parameters on a BPE of 4,096 ids; `nested_learning.pretrained` has it trained."""
    return _small(overrides, mixer="self_modifying_titans")


def transformer_small(**overrides: Any) -> HopeConfig:
    """The Transformer of hope-small's size; `nested_learning.pretrained` has it trained."""
    levels = [{"chunk_size": 512}]
    return _small(overrides, mixer="attention", cms_levels=levels, cms_expansion=ATTENTION_EXPANSION)


# Memories of the table in the place of attention: expansion of the MLPs that leads to hope-tiny's number of
# parameters, and options beside the chunk length.
_BASELINES: dict[str, tuple[float, dict[str, Any]]] = {
    "linear_attention": (5.1, {}),
    "retnet": (5.1, {}),
    "deltanet": (5.1, {}),
    "gated_deltanet": (5.1, {}),
    "oja": (5.1, {}),
    "ttt_linear": (5.1, {}),
    "ttt_mlp": (5.0, {}),
    "dla": (5.0, {}),
    "titans": (5.0, {}),
    "moneta": (4.2, {}),
    "yaad": (4.2, {}),
    "memora": (4.2, {}),
    "mag": (2.4, {"window": 64, "memory_options": {"chunk_size": 32}}),
    "mal": (2.9, {"window": 64, "memory_options": {"chunk_size": 32}}),
    "mac": (1.4, {"segment": 32}),
}


def _baseline(mixer: str) -> Callable[..., HopeConfig]:
    """transformer-tiny with a memory of the table as its mixer."""
    expansion, options = _BASELINES[mixer]

    def tiny(**overrides: Any) -> HopeConfig:
        own = {mixer: options} if options else {}
        levels = [{"chunk_size": 512}]
        return _tiny(overrides, mixer=mixer, mixer_options=own, cms_levels=levels, cms_expansion=expansion)

    return tiny


def _paper(hidden_size: int, overrides: dict[str, Any]) -> HopeConfig:
    """The paper gives totals only; widths and depths are the usual ones, MLPs fill up to the total."""
    base: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": hidden_size,
        "num_hidden_layers": 24,
        "num_heads": hidden_size // 64,
        "mixer": "self_modifying_titans",
        "cms_levels": [{"chunk_size": 512}, {"chunk_size": 2048}],
        "cms_expansion": 3.5,
    }
    return _config(base, 64, overrides)


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
    "hope-small": hope_small,
    "transformer-small": transformer_small,
    "hope-340m": hope_340m,
    "hope-760m": hope_760m,
    "hope-1.3b": hope_1b3,
    **{f"{mixer.replace('_', '-')}-tiny": _baseline(mixer) for mixer in _BASELINES},
}


def preset(name: str, **overrides: Any) -> HopeConfig:
    """The configuration called `name`, with fields of `HopeConfig` overridden.

    Raises:
        ValueError: for an unknown name or field (with the nearest valid one), or values that do not fit.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name](**overrides)
