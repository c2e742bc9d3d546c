"""The context of a reader, as a value: what the model's layers keep of the tokens read before.

Keys and values of attention, states of recurrent layers: whatever cache the model has, opened for one call
and closed after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from nested_learning.continual.cache_layers import PastLayer, state_layers
from nested_learning.continual.inputs import vocabulary_size

GROWING = ("keys", "values")  # tensors of a layer that have one entry per token


@dataclass(frozen=True)
class Context:
    """Everything that a model's layers keep of the tokens read before, cut from any graph. Never written to.

    Attributes:
        layers: tensors of each layer by name: "keys" and "values" [1, heads, tokens, d] of attention, states
            of recurrent layers.
        length: number of tokens in it.
    """

    layers: tuple[Mapping[str, Tensor], ...] = ()
    length: int = 0

    def __len__(self) -> int:
        """Number of tokens in it."""
        return self.length

    @property
    def is_croppable(self) -> bool:
        """Whether it says what it was some tokens ago: not where a state has summed them up."""
        return all(name in GROWING for layer in self.layers for name in layer)

    def crop(self, length: int) -> Context:
        """The first `length` tokens alone. ValueError if a recurrent layer does not tell them apart."""
        if length == len(self):
            return self
        if length and not self.is_croppable:
            raise ValueError(
                f"a context of {len(self)} tokens with recurrent states cannot be cut to {length}"
            )
        layers = tuple({name: t[..., :length, :] for name, t in layer.items()} for layer in self.layers)
        return Context(layers, length) if length else Context()

    def open(self) -> Cache:
        """The cache of a model with attention alone, for one call with arguments of its own."""
        cache = Cache(layer_class_to_replicate=PastLayer)
        for past in self.layers:
            layer = PastLayer()
            layer.take(past)
            cache.layers.append(layer)
        return cache

    @property
    def nbytes(self) -> int:
        return self.nbytes_at(len(self))

    def nbytes_at(self, length: int) -> int:
        """Bytes of a context of `length` tokens."""
        return sum(
            t.numel()
            * t.element_size()
            * (length if name in GROWING else 1)
            // (t.shape[-2] if name in GROWING else 1)
            for layer in self.layers
            for name, t in layer.items()
        )


class ContextReader:
    """How a model takes a context and gives it back.

    Args:
        model: the base model.

    Attributes:
        has_states: whether some of its layers are recurrent.
        stepwise: whether it reads single tokens alone after a context; see `check`.

    Raises:
        ValueError: it takes no cache from outside, or keeps what cannot be carried.
    """

    def __init__(self, model: Any) -> None:
        if model.config.model_type == "hope":
            raise ValueError(
                f"{type(model).__name__} keeps memories of its own in a HopeCache, which no context can "
                "carry; it learns in context by itself, and its weights are trained as those of any model"
            )
        takes = inspect.signature(model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in takes]
        if not names:
            raise ValueError(
                f"{type(model).__name__} takes no cache (its forward has neither past_key_values nor "
                "cache_params), so that reading cannot go on where it stopped"
            )
        self._argument = names[0]
        self._config = model.config
        self.has_states = state_layers(model.config) is not None
        self.stepwise = False

    def read(
        self, module: Any, ids: Tensor, context: Context, *, attached: bool = False
    ) -> tuple[Tensor, Context]:
        """Read ids [1, n] after `context` with the model, or with its body.

        Returns:
            logits [1, n, V] (of the body its last hidden states), and the context then, cut from the graph
            unless it is to stay `attached`.

        Raises:
            ValueError: the model did not use the cache as attention and recurrent layers do.
        """
        # Within the pass gradients flow from token to token, however it is read.
        parts, outputs = ids.split(1, dim=1) if self.stepwise and len(context) else (ids,), []
        for part in parts:
            output, context = self._read(module, part, context)
            outputs.append(output)
        if attached:
            return torch.cat(outputs, dim=1), context
        layers = tuple({name: t.detach() for name, t in layer.items()} for layer in context.layers)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], Context(layers, len(context))

    @torch.no_grad()
    def context_of(self, model: Any, tokens: Tensor) -> Context:
        """Context of tokens [n] read from position 0 on, without gradient, by the model without its head."""
        return self.read(model.base_model, tokens[None], Context())[1] if len(tokens) else Context()

    def _read(self, module: Any, ids: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Read ids in one call of the model; the context after it hangs in the call's graph."""
        layers = state_layers(self._config)
        if layers is None:
            cache = context.open()
        else:
            cache = Cache(layers=layers)  # type: ignore[arg-type]
            for layer, past in zip(layers, context.layers, strict=bool(context.layers)):
                layer.take(past)
        output = module(input_ids=ids, **{self._argument: cache}, use_cache=True)
        held = tuple(layer.held() for layer in cache.layers)  # type: ignore[union-attr]
        if not any(held):
            raise ValueError(
                "the model put nothing into the cache it was given; expected a causal language model whose "
                "layers have attention or recurrent states that are passed on"
            )
        # output[0] is the loss of the router where the configuration asks for it
        return output.get("logits", output[0]), Context(held, len(context) + ids.shape[1])

    @torch.no_grad()
    def check(self, model: Any) -> None:
        """Find out how a model with recurrent layers goes on from a context, by passes of a few tokens.

        Some take a state for a single token only: they are read token by token (`stepwise`).

        Raises:
            ValueError: it does not go on as it would have read on.
        """
        if not self.has_states:
            return
        vocab_size = vocabulary_size(model)
        ids = torch.arange(9, device=model.device)[None] * 7 % vocab_size
        difference = 0.0
        with evaluating(model):
            try:
                expected = self.read(model, ids, Context())[0][0, 3:].float()
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{type(model).__name__} does not read with transformers' cache, so that no context can "
                    f"be carried: {error}"
                ) from error
            _, begun = self.read(model, ids[:, :3], Context())
            self.read(model, ids[:, 5:], Context())  # what modules may keep is of another text now
            for self.stepwise in (False, True):
                first, context = self.read(model, ids[:, 3:4], begun)
                rest, _ = self.read(model, ids[:, 4:], context)
                difference = float((torch.cat([first, rest], dim=1)[0].float() - expected).abs().max())
                coarse = torch.finfo(model.dtype).eps > 1e-4
                if difference <= (0.1 if coarse else 1e-3) * max(float(expected.abs().max()), 1e-3):
                    return
        raise ValueError(
            f"{type(model).__name__} does not go on from the cache it is given: logits differ by "
            f"{difference:.3g} from those of a text that is read at once. It keeps its state in its modules, "
            "or does not pass it on, so that levels cannot read with it"
        )


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
