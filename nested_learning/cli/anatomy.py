"""The parameters of a model by part, how often each part changes, and the bytes of its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nested_learning.levels import Component, NestedSystem, levels
from nested_learning.memory.state import held_bytes
from nested_learning.models import HopeConfig, HopeForCausalLM
from nested_learning.training.config import OptimConfig
from nested_learning.training.optim import build_optimizer


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of parameters that serve one purpose.

    Attributes:
        name: what they are.
        parameters: their number over all layers.
        updates: how often their values, or the states that start from them, change.
    """

    name: str
    parameters: int
    updates: str


def parts(config: HopeConfig) -> list[Part]:
    """The parameters of a model by part, as `levels` sees it with the optimizer of the training recipe.

    No memory is taken for the weights.
    """
    with torch.device("meta"):
        model = HopeForCausalLM(config)
    system = levels(model, build_optimizer(model, OptimConfig()))
    weights = [component for component in system.components if component.kind == "weights"]
    return [Part(component.name, component.parameters, _updates(system, component)) for component in weights]


def _updates(system: NestedSystem, weights: Component) -> str:
    """How often memories that start from these weights are updated; where there are none, the weights."""
    started = [
        system[name].frequency
        for transfer in system.transfers
        if transfer.kind == "initial state" and weights.name in transfer.sources
        for name in transfer.targets
    ]
    frequencies = sorted(set(started) or {weights.frequency}, key=lambda frequency: frequency.rank)
    return ", ".join(map(str, frequencies))


def state_bytes(config: HopeConfig, tokens: Iterable[int]) -> dict[int, int]:
    """Bytes of the state of one sequence after so many tokens; a batch has as many times that.

    Measured on the model's own forward pass with tensors that have shapes but no memory. A mixer whose
    state is as large after two tokens as after one is recurrent and is not measured any further: where the
    CMS learns by "lm", its state is smaller than this right after a chunk, while states that are two within
    the chunk are still one.
    """
    mixers = config.layer_mixers
    total = dict.fromkeys(tokens, 0)
    shared = dict.fromkeys(total, 0)  # what a model has once, whatever its layers
    for mixer in set(mixers):
        one = _one_layer(config, mixer)
        first = _measure(one, 1)
        constant = _measure(one, 2) == first
        for length in total:
            layer, shared[length] = first if constant else _measure(one, length)
            total[length] += mixers.count(mixer) * layer
    return {length: total[length] + shared[length] for length in total}


def _one_layer(config: HopeConfig, mixer: str) -> HopeConfig:
    fields = config.to_dict() | {
        "num_hidden_layers": 1,
        "mixer": mixer,
        "mixer_options": {mixer: config.options_of(mixer)},
        "vocab_size": 1,
        "pad_token_id": None,
    }
    return HopeConfig.from_dict(fields)


def _measure(config: HopeConfig, tokens: int) -> tuple[int, int]:
    """Bytes of a layer's state, and of what the cache holds beside the layers' states."""
    with FakeTensorMode(), torch.no_grad():
        model = HopeForCausalLM(config).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        layers = [state for name, state in cache.states.items() if name.startswith("layers.")]
        own = held_bytes(t for state in layers for t in state.tensors())
        return own, cache.nbytes() - own
