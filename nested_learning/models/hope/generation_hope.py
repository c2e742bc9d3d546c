"""How transformers' `generate` and a HopeCache get along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.configuration_hope import HopeConfig

_GUESSES = GenerationMode.ASSISTED_GENERATION


class HopeGenerationMixin(GenerationMixin):
    """`GenerationMixin` with a HopeCache in the place of key-value caches."""

    config: HopeConfig

    def generate(
        self, inputs: Tensor | None = None, *args: Any, learn_from_generated: bool = False, **kwargs: Any
    ) -> Any:
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

        A CMS that learns in context (`cms_update`) learns from the prompt; from what is generated only with
        `learn_from_generated`. The last token returned is read by the next call, as part of its prompt.

        Raises:
            ValueError: for `learn_from_generated` where no CMS learns in context, and for whatever
                transformers refuses.
        """
        cache = kwargs.get("past_key_values")
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(cache, HopeCache) and cache.get_seq_length() and input_ids is not None:
            kwargs["attention_mask"] = self._mask_over_all_columns(cache, input_ids, kwargs)
        if self.config.cms_learns:
            if not learn_from_generated:
                kwargs["learned_columns"] = _prompt_columns(cache, input_ids, kwargs)
        elif learn_from_generated:
            raise ValueError(
                "learn_from_generated is for a CMS that learns in context; this model's does not (cms_update)"
            )
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        learned_columns: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; columns from `learned_columns` on are read, but not learned from."""
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            past_key_values=past_key_values,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if learned_columns is not None:
            fed = model_inputs.get("inputs_embeds")
            fed = model_inputs["input_ids"] if fed is None else fed
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            if seen + fed.shape[1] > learned_columns:
                columns = torch.arange(seen, seen + fed.shape[1], device=fed.device)
                model_inputs["learn_mask"] = (columns < learned_columns).expand(len(fed), -1)
        return model_inputs

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
            # peft wraps prepare_inputs_for_generation to put a learned prompt in front as long as there is no
            # cache, and takes one for empty only if it is of transformers' own. The model makes one then.
            wrapped = "prepare_inputs_for_generation" in vars(self) and generation_mode != _GUESSES
            if generation_config.use_cache is not False and not wrapped:
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


def _prompt_columns(cache: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns of everything that comes before the generated ones, from the start of the cache."""
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if mask is not None:
        return mask.shape[1]
    if embeds is not None:
        return embeds.shape[1] + (cache.get_seq_length() if isinstance(cache, HopeCache) else 0)
    return 1 if input_ids is None else input_ids.shape[1]  # generate starts from one token of its own
