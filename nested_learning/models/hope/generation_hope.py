"""How transformers' `generate` and a HopeCache get along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.configuration_hope import HopeConfig


class HopeGenerationMixin(GenerationMixin):
    """`GenerationMixin` with a HopeCache in the place of key-value caches."""

    config: HopeConfig

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Continue `inputs` [B, T]; everything transformers' `generate` offers but assisted decoding.

        With `past_key_values` from an earlier call, `inputs` may hold all ids so far and new ones, as in
        transformers, or the new ones alone: which of the two is seen by comparing them with the ids the cache
        was fed. (`generate` does not feed the last token it returns; it belongs to the new ones.) So new ids
        that happen to begin with exactly all the ids seen so far, in every row, are taken for all ids, and
        what repeats is not read again. Where that can happen, say which columns are meant: with an
        `attention_mask` over the old and the new columns, such as torch.ones(B, cache.get_seq_length() + T),
        `inputs` are the new ones.

        The given cache is advanced, except where rows are multiplied (beams, num_return_sequences): then a
        copy is.
        """
        cache = kwargs.get("past_key_values")
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(cache, HopeCache) and cache.get_seq_length() and input_ids is not None:
            kwargs["attention_mask"] = self._mask_over_all_columns(cache, input_ids, kwargs)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _mask_over_all_columns(
        self, cache: HopeCache, input_ids: Tensor, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """transformers takes ids for the whole sequence unless the attention mask is longer than they are."""
        mask = kwargs.get("attention_mask")
        given_all = mask is not None and mask.shape[1] != input_ids.shape[1]
        if given_all or cache.is_prefix_of(input_ids):
            return mask
        if mask is None:
            pad = kwargs.get("pad_token_id", self.generation_config.pad_token_id)
            mask = torch.ones_like(input_ids) if pad is None else input_ids.ne(pad).long()
        return torch.cat([mask.new_ones(len(mask), cache.get_seq_length()), mask], dim=1)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: the model counts positions itself. generate makes them for any model that could take them."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a HopeCache where generate expects its cache (instead of transformers' key-value caches)."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply to Hope, "
                "which has its own cache; leave it out"
            )
        if generation_config.is_assistant:
            raise ValueError(
                "a Hope model cannot be the assistant of another: its states cannot be rolled back"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = HopeCache(self.config)
            return
        if not isinstance(cache, HopeCache):
            raise ValueError(f"past_key_values must be a HopeCache, got {type(cache).__name__}")
        cache._is_user_defined = True  # generate must not run a step ahead on a cache that is not its own
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if copies > 1 and cache.batch_size == batch_size:
            cache = cache.clone()
            cache.batch_repeat_interleave(copies)
            model_kwargs["past_key_values"] = cache
