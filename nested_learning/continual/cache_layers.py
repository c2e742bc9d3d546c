"""Layers of a model's cache that read a past and leave it as it is: attention, recurrence, or both.

transformers' own layers grow and overwrite what they hold. These keep apart what they were opened with and
what they hold after the call, so that a layer that gradient checkpointing runs a second time reads the same
past again, and a context can be read from any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

CONV, RECURRENT = "conv", "recurrent"  # names of states are f"{CONV}.{index}"


class PastLayer(DynamicLayer):
    """One attention layer's keys and values [1, heads, tokens, d]; `update` joins new ones to the past."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.joined: tuple[Tensor, Tensor] | None = None

    def take(self, past: Mapping[str, Tensor]) -> None:
        """Begin with what `held` gave after an earlier call."""
        if "keys" in past:
            self.keys, self.values, self.is_initialized = past["keys"], past["values"], True

    def held(self) -> dict[str, Tensor]:
        """Tensors after the call, by name; none of a layer that was not used."""
        if self.joined is None:
            return {}
        return {"keys": self.joined[0], "values": self.joined[1]}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:  # read in another precision, or under autocast
            key_states = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
            value_states = torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)
        self.joined = key_states, value_states
        return self.joined


class _Taken(Tensor):
    """A state as a model takes it. What the model copies into it is put aside, since autograd may have kept
    the state as it was; kernels that write into its memory write into this copy."""

    written: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and isinstance(args[0], cls):
            args[0].written = args[1]
            return args[0]
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))

    def now(self) -> Tensor:
        """The state after the call."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor) if self.written is None else self.written


class _Copies(dict[int, Tensor]):
    """States by index. Whoever takes one gets a copy, as models write into what they take, and that is then
    what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, _Taken] = {}

    def __getitem__(self, index: int) -> Tensor | None:  # type: ignore[override]
        past = self.get(index)
        if past is None:
            return None
        self.taken[index] = past.clone().as_subclass(_Taken)
        return self.taken[index]


class StateLayer(LinearAttentionLayer):
    """States of a recurrent layer: inputs that its convolution looks back at, and what it has summed up."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self._begin()

    def _begin(self) -> None:
        self.conv_states, self.recurrent_states = _Copies(), _Copies()  # type: ignore[assignment]
        self.after: dict[str, Tensor] = {}

    def take(self, past: Mapping[str, Tensor]) -> None:
        """Begin with what `held` gave after an earlier call."""
        for name, states in ((CONV, self.conv_states), (RECURRENT, self.recurrent_states)):
            for index in range(self.number_of_states):
                if f"{name}.{index}" in past:
                    states[index] = past[f"{name}.{index}"]
                    self.has_previous_state[index] = True

    def held(self) -> dict[str, Tensor]:
        """Tensors after the call, by name."""
        found: dict[str, Tensor] = {}
        for name, states in ((CONV, self.conv_states), (RECURRENT, self.recurrent_states)):
            assert isinstance(states, _Copies)
            found |= {f"{name}.{index}": past for index, past in states.items()}
            found |= {f"{name}.{index}": taken.now() for index, taken in states.taken.items()}
        return found | self.after

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        past = self.conv_states.get(state_idx)
        if past is not None:
            size, full = past.shape[-1], torch.cat([past, conv_states], dim=-1)
        else:
            size = conv_kernel_size or conv_states.shape[-1]
            full = F.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self.after[f"{CONV}.{state_idx}"] = full[..., -size:]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.after[f"{RECURRENT}.{state_idx}"] = recurrent_states
        return recurrent_states


class StateAndPastLayer(StateLayer, PastLayer):  # type: ignore[misc, override]
    """A layer with attention and recurrence side by side."""

    def __init__(self, number_of_states: int = 1) -> None:
        PastLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._begin()

    def take(self, past: Mapping[str, Tensor]) -> None:
        PastLayer.take(self, past)
        StateLayer.take(self, past)

    def held(self) -> dict[str, Tensor]:
        return PastLayer.held(self) | StateLayer.held(self)


class NoLayer(DummyLayer):
    """A layer without attention and recurrence."""

    def take(self, past: Mapping[str, Tensor]) -> None: ...

    def held(self) -> dict[str, Tensor]:
        return {}


CacheLayer = PastLayer | StateLayer | NoLayer


def state_layers(config: Any) -> list[CacheLayer] | None:
    """The layers of an empty cache of a model some of whose layers are recurrent; None without such, where a
    PastLayer for each layer that asks for one is enough.

    Raises:
        ValueError: a layer keeps something else.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ()
    try:
        own = DynamicCache(config=config).layers
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{_what(config, kinds)}: transformers makes no cache for it ({error!r})") from error
    if all(isinstance(layer, (DynamicLayer, DummyLayer)) and _like(layer) is PastLayer for layer in own):
        return None
    made: list[CacheLayer] = []
    for layer in own:
        like = _like(layer)
        if like is None:
            raise ValueError(f"{_what(config, kinds)}: a {type(layer).__name__} cannot be carried")
        states = getattr(layer, "number_of_states", None)
        made.append(like(number_of_states=states) if issubclass(like, StateLayer) else like())  # type: ignore[arg-type]
    return made


def _like(layer: Any) -> type[PastLayer] | type[StateLayer] | type[NoLayer] | None:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return PastLayer
    if type(layer) is LinearAttentionLayer:
        return StateLayer
    if type(layer) in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return StateAndPastLayer
    return NoLayer if type(layer) is DummyLayer else None


def _what(config: Any, kinds: Any) -> str:
    named = ", ".join(sorted({str(kind) for kind in kinds}))
    return (
        f"a {config.model_type} model has layers of type {named}; expected attention (full, sliding or "
        "chunked) and recurrent layers, whose cache a context is"
    )
