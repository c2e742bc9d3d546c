"""Where a model's parameters are, at which frequency each part changes, and what its state weighs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_learning.layers.cms import parse_levels
from nested_learning.models import HopeConfig, HopeForCausalLM

LAYER = re.compile(r"layers\.(\d+)\.(mixer|cms)\.(.*)")
OUTER = "optimizer step"


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of parameters that serve one purpose.

    Args:
        name: what they are.
        parameters: how many, over all layers.
        updates: how often their values, or the states that start from them, change.
    """

    name: str
    parameters: int
    updates: str


def parts(config: HopeConfig) -> list[Part]:
    """The parameters of a model by part, from input to output; no memory is taken for the weights."""
    with torch.device("meta"):
        model = HopeForCausalLM(config)
    counts: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        key = _part_of(name, config)
        counts[key] = counts.get(key, 0) + parameter.numel()
    return [Part(name, count, updates) for (name, updates), count in counts.items()]


def _part_of(name: str, config: HopeConfig) -> tuple[str, str]:
    """(name of the part, how often it changes) for a parameter's name."""
    if "embed_tokens" in name:
        return "embedding, also the head" if config.tie_word_embeddings else "embedding", OUTER
    if name.startswith("lm_head"):
        return "head", OUTER
    match = LAYER.search(name)
    if match is None:
        return "norms", OUTER
    layer, group, rest = int(match[1]), match[2], match[3]
    if group == "cms":
        level = int(rest.split(".")[1])
        size = parse_levels(config.cms_levels or [])[level].chunk_size
        # Without an update rule a level is frozen in context and its chunk length is its outer frequency.
        return (
            f"CMS level {level + 1} (chunk {size})",
            OUTER if config.cms_update == "none" else f"{size} tokens",
        )
    mixer = config.layer_mixers[layer]
    if rest.startswith("initial."):
        return f"{mixer}: initial memories", _chunks(config, mixer)
    return f"{mixer}: projections and gates", OUTER


def _chunks(config: HopeConfig, mixer: str) -> str:
    """The weights of a memory move at every token; its gradients are taken at an anchor, set less often."""
    with torch.device("meta"):
        layer = HopeForCausalLM(_one_layer(config, mixer)).model.layers[0].mixer
    system = getattr(layer, "system", None)
    sizes = sorted(set(getattr(system, "chunk_sizes", ())))
    return f"token, anchor {'/'.join(map(str, sizes))}" if sizes else "token"


def state_bytes(config: HopeConfig, tokens: Iterable[int]) -> dict[int, int]:
    """Bytes of the state of one sequence after so many tokens; a batch has as many times that.

    Measured on the model's own forward pass with tensors that have shapes but no memory. A mixer whose
    state is as large after two tokens as after one is recurrent and is not measured any further.
    """
    mixers = config.layer_mixers
    total = dict.fromkeys(tokens, 0)
    for mixer in set(mixers):
        one = _one_layer(config, mixer)
        first = _measure(one, 1)
        constant = _measure(one, 2) == first
        for length in total:
            total[length] += mixers.count(mixer) * (first if constant else _measure(one, length))
    return total


def _one_layer(config: HopeConfig, mixer: str) -> HopeConfig:
    fields = config.to_dict() | {
        "num_hidden_layers": 1,
        "mixer": mixer,
        "mixer_options": {mixer: config.options_of(mixer)},
        "vocab_size": 1,
        "pad_token_id": None,
    }
    return HopeConfig.from_dict(fields)


def _measure(config: HopeConfig, tokens: int) -> int:
    with FakeTensorMode(), torch.no_grad():
        model = HopeForCausalLM(config).eval()
        inputs: Any = torch.zeros(1, tokens, config.hidden_size)
        output = model(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)
        return output.past_key_values.nbytes()
