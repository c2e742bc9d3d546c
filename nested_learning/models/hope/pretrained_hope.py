"""Everything that all Hope models share with transformers: loading, saving and the weights at the start."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel
from transformers import initialization as init

from nested_learning._precision import warn_of_slow_bfloat16
from nested_learning.layers.attention.softmax import Attention
from nested_learning.layers.cms import ContinuumMemorySystem
from nested_learning.layers.cms.writer import LevelWriter
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.compiled_hope import CompiledBlocks
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.placement_hope import device_of
from nested_learning.ops.heads import conv_std


def weight_std(module: nn.Linear | nn.Embedding, config: HopeConfig) -> float:
    """Standard deviation of the weights at the start, of everything that is not inside a memory layer.

    A tied embedding is the head too: with a normalised input of width D, 1/√D gives logits of order 1.
    """
    if isinstance(module, nn.Embedding):
        return config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
    return config.initializer_scale * module.in_features**-0.5


class HopePreTrainedModel(PreTrainedModel):
    """Weights, loading and saving of all Hope models."""

    config: HopeConfig
    config_class = HopeConfig
    _compiled_blocks: CompiledBlocks | None = None
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: HopeConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, HopeConfig):
            raise ValueError(f"{type(self).__name__} needs a HopeConfig, got {type(config).__name__}")
        config.validate()  # fields may have been set since it was made
        super().__init__(config, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its weights are or, with accelerate's offload, are brought to.

        transformers says "meta" of a model whose weights are all brought, and no ids can be sent there.
        """
        device = super().device
        return device_of(self) if device.type == "meta" else device

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; warns where the weights are bfloat16 and nothing runs that fast."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.dtype == torch.bfloat16 and not torch.accelerator.is_available():
            warn_of_slow_bfloat16(model.device, "load with dtype=torch.float32")
        return loaded

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Recompute blocks in the backward pass, always by the non-reentrant way.

        The other one has no gradients through states, which are no tensors but dataclasses of them.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            warnings.warn(
                "Hope's states need gradient checkpointing with use_reentrant=False: taken instead of True",
                stacklevel=2,
            )
            activation_checkpointing_kwargs = {**activation_checkpointing_kwargs, "use_reentrant": False}  # type: ignore[dict-item]
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """The model's call, whose blocks run through torch.compile where they read one token."""
        config = compile_config or CompileConfig()
        if self._compiled_blocks is None or self._compiled_blocks.config != config:
            self._compiled_blocks = CompiledBlocks(copy.copy(config))
        return partial(self.__call__, compiled=self._compiled_blocks)

    @contextmanager
    def adaptation_scope(self, cache: HopeCache | None = None) -> Iterator[HopeCache]:
        """Whatever the model's memories learn inside with `cache` is undone on leaving, bit for bit.

        Also after an exception. It is the cache that learns from what is read, so pass it on: to calls as
        `past_key_values`, which `generate` takes too (where rows are multiplied, as by beams, generate
        advances a copy). Nothing is copied. Scopes may be nested. Weights that an optimizer changes inside
        stay changed.

        Args:
            cache: the cache of the rows that go on; None for a new one, empty again on leaving.

        Yields:
            the cache.

        Raises:
            ValueError: it is no `HopeCache`, or that of a model with another configuration.
        """
        if cache is None:
            cache = HopeCache(self.config)
        if not isinstance(cache, HopeCache):
            raise ValueError(
                f"adaptation_scope takes the HopeCache whose learning is to be undone, got "
                f"{type(cache).__name__}: model(ids, use_cache=True).past_key_values is one"
            )
        cache.check(self.config, cache.batch_size)
        with cache.adaptation_scope():
            yield cache

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """As in transformers for classes elsewhere; the code of this package is not copied into folders."""
        if not cls.__module__.startswith("nested_learning."):
            super().register_for_auto_class(auto_class)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of transformers, modules without parameters of their own are passed over. A block
        # is such a module, and its mixer would be left with the rule for plain linear layers.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for every module, children first."""
        init_module(module, self.config)


@torch.no_grad()
def init_module(module: nn.Module, config: HopeConfig) -> None:
    """Initialise a module whose children are done. The functions of `init` leave loaded weights alone."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        init.normal_(module.weight, std=weight_std(module, config))
        bias = getattr(module, "bias", None)
        if bias is not None:
            init.zeros_(bias)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, Attention) and module.conv is not None:
        init.normal_(module.conv.weight, std=conv_std(module.conv_size))
    elif isinstance(module, LevelWriter) and module.log_lr is not None:
        init.constant_(module.log_lr, math.log(module.level.option("lr")))
    elif isinstance(module, ContinuumMemorySystem):
        for weights in module.head_weights:
            init.ones_(weights)
    elif isinstance(module, HopeBlock) and hasattr(module.mixer, "reset_parameters"):
        _reset_unloaded(module.mixer)


def _reset_unloaded(mixer: nn.Module) -> None:
    """Run the layer's own initialisation, keeping what was loaded from a checkpoint."""
    tensors = [*mixer.parameters(), *mixer.buffers()]
    loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if tensors and len(loaded) == len(tensors):
        return
    values = [t.detach().clone() for t in loaded]
    mixer.reset_parameters()  # type: ignore[operator]
    for tensor, value in zip(loaded, values, strict=True):
        tensor.data.copy_(value)
