"""How transformers' `generate` and a HopeCache get along."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from nested_learning.layers.token_inputs import document_positions
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.ops.context import has_values

# Ways to generate that transformers loads as code from the hub, and why Hope does not go them.
REMOTE_MODES = {
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search (penalty_alpha) is code for key-value caches",
    GenerationMode.DOLA_GENERATION: "DoLa (dola_layers) needs a head that reads the output of every layer",
    GenerationMode.GROUP_BEAM_SEARCH: "group beam search (num_beam_groups) is code for key-value caches",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "constrained beam search (force_words_ids, constraints) is code "
    "for key-value caches",
}
GUESSES_OF_OTHERS = {
    "assistant_early_exit": "its layers cannot be cut off one by one",
    "use_mtp": "it has no heads that predict several tokens",
    "speculation_type": "it has no model that drafts from its hidden states",
}
_GUESSES = GenerationMode.ASSISTED_GENERATION


class HopeGenerationMixin(GenerationMixin):
    """`GenerationMixin` with a HopeCache in the place of key-value caches."""

    config: HopeConfig

    def generate(
        self, inputs: Tensor | None = None, *args: Any, learn_from_generated: bool = False, **kwargs: Any
    ) -> Any:
        """Continue `inputs` [B, T], by all of transformers' own ways: greedy, samples, beams, guesses.

        Guesses (`prompt_lookup_num_tokens`, or `assistant_model`, which may be a Hope model too) are for one
        row. The state before a guess is kept, and what was right of it is read a second time from there.

        With `past_key_values` from an earlier call, `inputs` may hold all ids so far and new ones, as in
        transformers, or the new ones alone: which of the two is seen by comparing them with the ids the cache
        was fed. (`generate` does not feed the last token it returns; it belongs to the new ones.) So new ids
        that happen to begin with exactly all the ids seen so far, in every row, are taken for all ids, and
        what repeats is not read again. Where that can happen, say which columns are meant: with an
        `attention_mask` over the old and the new columns, such as torch.ones(B, cache.get_seq_length() + T),
        `inputs` are the new ones. Embeddings (`inputs_embeds`) cannot be compared: they are all so far and
        new ones, as in transformers, unless such a mask says that they are the new ones.

        The given cache is advanced, except where rows are multiplied (beams, num_return_sequences): then a
        copy is.

        A CMS that learns in context (`cms_update`) learns from the prompt, or from what a `learn_mask` of its
        shape names; from what is generated only with `learn_from_generated`. The last token returned is read
        by the next call, as part of its prompt.

        Rows of several documents are told as to the model, by `position_ids`, `seq_idx` or `cu_seq_lens_q`
        for the columns of `inputs`; what is generated belongs to each row's last one.

        Raises:
            ValueError: for `learn_from_generated` where no CMS learns in context, for a `learn_mask` or
                documents that do not fit `inputs`, for embeddings that are no more than what the cache was
                fed, for ways to generate that transformers loads from the hub, and for whatever transformers
                refuses.
        """
        cache = kwargs.get("past_key_values")
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        config = next(filter(None, (kwargs.get("generation_config"), *args[:1])), self.generation_config)
        if isinstance(cache, HopeCache) and cache.get_seq_length():
            kwargs["attention_mask"] = self._mask_over_all_columns(cache, input_ids, kwargs, config)
        given = input_ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if given is not None and not config.is_assistant:
            columns = _prompt_columns(cache, input_ids, kwargs)
            self._say_by_positions(given, columns, kwargs, config)
            if self.config.cms_learns and kwargs.get("learn_mask") is not None:
                kwargs["learned_prompt"] = _over_all_columns(kwargs.pop("learn_mask"), given, columns)
        if self.config.cms_learns:
            if not learn_from_generated:  # an assistant is told how much of its input was the prompt
                kwargs.setdefault("learned_columns", _prompt_columns(cache, input_ids, kwargs))
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
        learned_prompt: Tensor | None = None,
        columns_read: int | None = None,
        embeds_are_new: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, and for Hope:

        Args:
            learned_columns: columns from here on are read, but not learned from.
            learned_prompt: [B, columns] the `learn_mask` of the prompt, from the start of the cache.
            columns_read: of the first `input_ids` of assisted decoding, how many the cache has read.
            embeds_are_new: whether none of the columns of `inputs_embeds` is in the cache.
        """
        if columns_read is not None and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = input_ids.shape[1] - columns_read
        if embeds_are_new and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = None
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            past_key_values=past_key_values,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        fed = model_inputs.get("inputs_embeds")
        fed = model_inputs["input_ids"] if fed is None else fed
        if columns_read is not None and model_inputs.get("attention_mask") is not None:
            model_inputs["attention_mask"] = model_inputs["attention_mask"][:, -fed.shape[1] :]
        mask = model_inputs.get("attention_mask")
        if mask is not None and fed.shape[1] == 1:
            # The older columns count no more, and a mask that grows would be a graph for each length.
            model_inputs["attention_mask"] = mask = mask[:, -1:].contiguous()
            if has_values(mask) and mask.all():
                del model_inputs["attention_mask"]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        after = seen + fed.shape[1]
        masked = 0 if learned_prompt is None else learned_prompt.shape[1]
        if seen < masked or (learned_columns is not None and after > learned_columns):
            columns = torch.arange(seen, after, device=fed.device)
            most = after if learned_columns is None else learned_columns
            model_inputs["learn_mask"] = (columns < most).repeat(len(fed), 1)
            if learned_prompt is not None and seen < masked:
                model_inputs["learn_mask"][:, : masked - seen] &= learned_prompt[:, seen:after]
        return model_inputs

    # Guesses that are taken back where they are wrong ------------------------------------------------------

    def _assisted_decoding(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; the prompt is read before the first guess, which may be taken back."""
        own = inspect.signature(GenerationMixin._assisted_decoding).parameters
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        cache, config = kwargs.get("past_key_values"), options["generation_config"]
        if isinstance(cache, HopeCache) and len(input_ids) == 1 and kwargs.get("inputs_embeds") is None:
            kwargs["columns_read"] = self._read_prompt(input_ids, cache, config, kwargs)
            mask = kwargs.get("attention_mask")
            if mask is not None:  # over the given ids, as transformers goes on to lengthen it
                kwargs["attention_mask"] = mask[:, -input_ids.shape[1] :]
        try:
            return super()._assisted_decoding(input_ids, **options, **kwargs)  # type: ignore[arg-type, misc]
        finally:
            if isinstance(cache, HopeCache):
                cache.recording = None

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """As in transformers; an assistant's guesses may be taken back up to the last token of the prompt.

        Embeddings are those of all columns there. Here a mask that covers more says that they are new ones.
        """
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        if embeds is not None and isinstance(cache, HopeCache):
            mask = model_kwargs.get("attention_mask")  # None where all of it was 1
            columns = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
            model_kwargs = {**model_kwargs, "embeds_are_new": columns > embeds.shape[1]}
        if generation_config.is_assistant and isinstance(cache, HopeCache):
            if not cache.get_seq_length():
                self._read_prompt(input_ids, cache, generation_config, model_kwargs)
            cache.activate_past_recording()
        return super()._prefill(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            generation_config,
            model_kwargs,
            is_first_iteration,
        )

    def _read_prompt(
        self, input_ids: Tensor, cache: HopeCache, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> int:
        """Read the new columns of a prompt but its last, and return how many of `input_ids` are read then.

        Where hidden states are wanted, nothing: they come from the call that reads the whole prompt.
        """
        length, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        all_columns = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        start = cache.get_seq_length() if all_columns == length else 0
        if generation_config.output_hidden_states:
            return start
        size = generation_config.prefill_chunk_size or length
        for first in range(start, length - 1, size):
            last = min(first + size, length - 1)
            options = dict(model_kwargs)
            if mask is not None:
                options["attention_mask"] = mask[:, -length:][:, first:last]
            if positions is not None:
                options["position_ids"] = positions[:, -length:][:, first:last]
            inputs = self.prepare_inputs_for_generation(
                input_ids[:, first:last], is_first_iteration=True, **options
            )
            self(**inputs, return_dict=True)  # type: ignore[operator]
        return max(start, length - 1)

    def _get_candidate_generator(  # type: ignore[override]
        self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """As in transformers; an assistant gets no arguments that are none of its own."""
        config = kwargs["generation_config"]
        for name, reason in GUESSES_OF_OTHERS.items():
            if getattr(config, name, None):
                raise ValueError(
                    f"{name} is no way for Hope to guess: {reason}; use prompt_lookup_num_tokens or an "
                    "assistant_model"
                )
        assistant = kwargs.get("assistant_model")
        learns = getattr(getattr(assistant, "config", None), "cms_learns", False)
        hidden = {"columns_read"} if learns else {"columns_read", "learned_columns", "learned_prompt"}
        given = {name: value for name, value in model_kwargs.items() if name not in hidden}
        return super()._get_candidate_generator(*args, model_kwargs=given, **kwargs)  # type: ignore[misc]

    # What transformers' generate asks of a model -----------------------------------------------------------

    def _get_deprecated_gen_repo(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse the ways to generate that transformers would load from the hub."""
        if generation_mode in REMOTE_MODES:
            raise ValueError(
                f"Hope does not run code from the hub to generate: {REMOTE_MODES[generation_mode]}; use "
                "greedy decoding, sampling (do_sample=True), beam search (num_beams) or guesses "
                "(prompt_lookup_num_tokens, assistant_model)"
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching pages key-value caches, which a memory's states are not.

        Raises:
            ValueError: always; also by way of `generate_batch` and `cache_implementation="paged"`.
        """
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') pages key-value caches, and "
            "Hope's states are none; use generate on a batch with padding on the left: a row's state takes "
            "the same memory however long the text is"
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """As in transformers, but only where a `compile_config` asks for it: no device compiles by itself."""
        asked = generation_config.compile_config is not None
        return asked and super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    def _mask_over_all_columns(
        self, cache: HopeCache, input_ids: Tensor | None, kwargs: dict[str, Any], config: GenerationConfig
    ) -> Tensor | None:
        """transformers takes ids for the whole sequence unless the attention mask is longer than they are."""
        seen, mask, embeds = cache.get_seq_length(), kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if embeds is not None:
            length = embeds.shape[1]
            if length <= seen and (mask is None or mask.shape[1] <= length):
                raise ValueError(
                    f"inputs_embeds has {length} columns, the cache has read {seen}: give the embeddings of "
                    "all columns and new ones, or the new ones alone with an attention_mask over all "
                    f"columns, [batch, {seen + length}]"
                )
            return mask
        if input_ids is None:  # generate starts from one token of its own, after those in the cache
            device = self.device  # type: ignore[attr-defined]
            return torch.ones(1, seen + 1, dtype=torch.long, device=device) if mask is None else mask
        given_all = mask is not None and mask.shape[1] != input_ids.shape[1]
        if given_all or cache.is_prefix_of(input_ids):
            return mask
        mask = self._mask_of(input_ids, kwargs, config)
        return torch.cat([mask.new_ones(len(mask), seen), mask], dim=1)

    def _say_by_positions(
        self, given: Tensor, columns: int, kwargs: dict[str, Any], config: GenerationConfig
    ) -> None:
        """Put position_ids of all columns in the place of what says where documents begin in the given ones.

        `generate` lengthens and cuts these alone, by the place of a column.

        Args:
            given: [B, T] or [B, T, D], of the last T columns.
            columns: all columns, with those that the cache has read.
            kwargs, config: of `generate`.
        """
        names = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
        said = {name: kwargs.pop(name, None) for name in names}
        if all(each is None for each in said.values()):
            return
        seen, real = columns - given.shape[1], self._mask_of(given, kwargs, config).to(given.device).bool()
        found = document_positions(given, real, seen, **said).expand(len(given), -1)
        kwargs["position_ids"] = torch.cat([found.new_zeros(len(found), seen), found], dim=1)

    def _mask_of(self, given: Tensor, kwargs: dict[str, Any], config: GenerationConfig) -> Tensor:
        """The mask [B, T] of the given ids or embeddings, nonzero for real tokens."""
        mask = kwargs.get("attention_mask")
        if mask is not None:
            return mask[:, -given.shape[1] :]
        if given.dim() == 3:
            return torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        return self._mask_of_padding(given, kwargs, config)

    def _mask_of_padding(self, input_ids: Tensor, kwargs: dict[str, Any], config: GenerationConfig) -> Tensor:
        """The mask [B, T] that transformers makes where none is given.

        A padding token that also ends texts may be either: then no token is taken for padding.
        """
        pad, eos = (
            next((v for v in (kwargs.get(name), *own) if v is not None), None)
            for name in ("pad_token_id", "eos_token_id")
            for own in [[getattr(each, name) for each in (config, self.generation_config)]]
        )
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if pad is None or int(pad) in ends:
            return torch.ones_like(input_ids)
        return input_ids.ne(int(pad)).long()

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
        if generation_config.is_assistant:  # the other model's; Hope counts its own
            model_kwargs.pop("position_ids", None)
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
        if generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False reads all columns again for each token, which the cache given as "
                "past_key_values would learn again and again: leave one of the two out"
            )
        cache._is_user_defined = True  # generate must not run a step ahead on a cache that is not its own
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if copies > 1 and cache.batch_size == batch_size:
            cache = cache.clone()
            cache.batch_repeat_interleave(copies)
            model_kwargs["past_key_values"] = cache


def _over_all_columns(learn_mask: Tensor, given: Tensor, columns: int) -> Tensor:
    """A learn_mask of the given tokens, [B, columns] bool; what was read before is not read again."""
    if not isinstance(learn_mask, Tensor) or learn_mask.shape != given.shape[:2]:
        got = list(learn_mask.shape) if isinstance(learn_mask, Tensor) else type(learn_mask).__name__
        raise ValueError(f"learn_mask must be [batch, tokens] = {list(given.shape[:2])}, got {got}")
    learned = learn_mask.to(given.device).bool()
    return torch.cat([learned.new_ones(len(learned), columns - learned.shape[1]), learned], dim=1)


def _prompt_columns(cache: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns of everything that comes before the generated ones, from the start of the cache."""
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if mask is not None:
        return mask.shape[1]
    if embeds is not None:
        return embeds.shape[1] + (cache.get_seq_length() if isinstance(cache, HopeCache) else 0)
    return 1 if input_ids is None else input_ids.shape[1]  # generate starts from one token of its own
