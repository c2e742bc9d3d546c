"""The attention context of a reader, as a value: keys and values of the tokens read before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class _PastLayer(DynamicLayer):
    """One layer's keys and values; `update` joins new ones to the past and changes nothing.

    So a layer that gradient checkpointing runs a second time reads the same past again. (transformers'
    own layers would append the new keys twice.)
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.joined: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.joined = key_states, value_states
        return self.joined


@dataclass(frozen=True)
class Context:
    """Keys and values [1, heads, tokens, d] of each layer, cut from any graph. Never written to."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        """Number of tokens in it."""
        return self.layers[0][0].shape[-2] if self.layers else 0

    def crop(self, length: int) -> Context:
        """The first `length` tokens alone."""
        if length == len(self):
            return self
        return Context(tuple((k[..., :length, :], v[..., :length, :]) for k, v in self.layers if length))

    def to(self, dtype: torch.dtype) -> Context:
        """Context of equal keys and values in another precision."""
        return Context(tuple((keys.to(dtype), values.to(dtype)) for keys, values in self.layers))

    def open(self) -> Cache:
        """The `past_key_values` for one call of the model."""
        cache = Cache(layer_class_to_replicate=_PastLayer)
        for keys, values in self.layers:
            layer = _PastLayer()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            cache.layers.append(layer)
        return cache

    @classmethod
    def closed(cls, cache: Cache) -> Context:
        """The context after the call that `cache` was opened for.

        Raises:
            ValueError: the model did not use it as attention layers do.
        """
        joined = [getattr(layer, "joined", None) for layer in cache.layers]
        if not joined or any(pair is None for pair in joined):
            raise ValueError(
                "the model did not put its keys and values into the cache it was given; "
                "expected a causal language model whose layers all have attention"
            )
        return cls(tuple((keys.detach(), values.detach()) for keys, values in joined))  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout inside the scope, whatever mode its modules are in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers keep their inputs only and run again in the backward pass.

    transformers' own switch needs training mode, where layers have dropout and drop their cache; so the
    layers' `forward` is wrapped on the instances, inside the scope. The scope must include the backward
    pass, or the second run would see other weights.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers can checkpoint; "
            "set gradient_checkpointing=False"
        )
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        object.__setattr__(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                object.__delattr__(layer, "forward")
            else:
                object.__setattr__(layer, "forward", forward)
