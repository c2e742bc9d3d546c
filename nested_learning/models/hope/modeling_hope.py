"""Hope (arXiv 2512.24695, §8.3): blocks of a sequence mixer and a continuum memory system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from nested_learning.layers.cms import ContinuumMemorySystem
from nested_learning.layers.cms.writer import LevelWriter
from nested_learning.layers.memory_layer import set_compile_step, set_recompute
from nested_learning.layers.registry import build_mixer
from nested_learning.memory import check
from nested_learning.memory.state import State, Weights
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.generation_hope import HopeGenerationMixin
from nested_learning.models.hope.lm_update import Head, LMUpdate
from nested_learning.models.hope.loss_hope import causal_lm_loss
from nested_learning.models.hope.pieces_hope import Piece, columns_of_this_call, join


@dataclass
class HopeModelOutput(BaseModelOutputWithPast):
    """As `BaseModelOutputWithPast`; `surprise` has one [B, T] per block, None where the mixer has none."""

    surprise: tuple[Tensor | None, ...] | None = None


@dataclass
class HopeCausalLMOutput(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`; `surprise` has one [B, T] per block, None where the mixer has none."""

    surprise: tuple[Tensor | None, ...] | None = None


# Weights for the CMS blocks of some layers during one call: layer index to one entry per level.
CMSWeights = Mapping[int, Sequence[Weights | None]]


def weight_std(module: nn.Linear | nn.Embedding, config: HopeConfig) -> float:
    """Standard deviation at the start, of everything that is not inside a memory layer.

    A tied embedding is the head too: with a normalised input of width D, 1/√D gives logits of order 1.
    """
    if isinstance(module, nn.Embedding):
        return config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
    return config.initializer_scale * module.in_features**-0.5


class HopeBlock(GradientCheckpointingLayer):
    """x ← x + mixer(RMSNorm(x)), then x ← CMS(x), whose blocks bring their own norms and residuals."""

    def __init__(self, config: HopeConfig, layer_index: int) -> None:
        super().__init__()
        name = config.layer_mixers[layer_index]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(name, config.hidden_size, config.num_heads, config.options_of(name))
        set_recompute(self.mixer, config.recompute)
        set_compile_step(self.mixer, config.compile_step)
        self.cms = config.build_cms()

    def forward(
        self,
        x: Tensor,
        mixer_state: State | None,
        cms_state: State | None,
        mask: Tensor | None,
        surprise: bool,
        cms_weights: Sequence[Weights | None] | None = None,
        learn: Tensor | None = None,
    ) -> tuple[Tensor, State | None, State | None, Tensor | None]:
        """x [B, T, D] to (y [B, T, D], mixer state, CMS state, surprise [B, T] or None).

        `cms_weights`: per level, weights to use in place of the block's own; `learn` [B, T]: which tokens the
        CMS learns from; see `ContinuumMemorySystem`.
        """
        options = {"return_surprise": True} if surprise and getattr(self.mixer, "has_surprise", False) else {}
        with check.scope("mixer"):
            mixed, mixer_state, *errors = self.mixer(self.mixer_norm(x), mixer_state, mask, **options)
        with check.scope("cms"):
            x, cms_state = self.cms(x + mixed, cms_state, cms_weights, mask, learn)
        return x, mixer_state, cms_state, errors[0] if errors else None


class HopePreTrainedModel(PreTrainedModel):
    """Weights, loading and saving of all Hope models."""

    config: HopeConfig
    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a state cannot be rolled back: generate refuses assisted decoding

    def __init__(self, config: HopeConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, HopeConfig):
            raise ValueError(f"{type(self).__name__} needs a HopeConfig, got {type(config).__name__}")
        config.validate()  # fields may have been set since it was made
        super().__init__(config, *args, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Recompute blocks in the backward pass; only the non-reentrant way has gradients through states."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("Hope's states need gradient checkpointing with use_reentrant=False")
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of transformers, modules without parameters of their own are passed over. A block
        # is such a module, and its mixer would be left with the rule for plain linear layers.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called for every module, children first. The functions of `init` leave loaded weights alone."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=weight_std(module, self.config))
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
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


class HopeModel(HopePreTrainedModel):
    """Embedding, blocks and final norm, without a head."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HopeBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.cms_learns = config.cms_learns  # parses the levels, which torch.compile cannot follow
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_surprise: bool = False,
        cms_weights: CMSWeights | None = None,
        learn_mask: Tensor | None = None,
        lm_head: Head | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> HopeModelOutput:
        """Run the blocks over new tokens.

        Args:
            input_ids: [B, T] int; or `inputs_embeds` [B, T, D] instead.
            attention_mask: [B, T], or [B, S + T] where the cache has seen S columns, of which the last T
                count; nonzero marks a real token. A masked token changes no state and no other token's
                output.
            past_key_values: continue from this cache, of this model or one with the same configuration; it is
                advanced in place and returned.
            use_cache: return a cache (default: `config.use_cache`, but not while training).
            output_hidden_states: return the embedding's output and each block's, the last one normalised.
            output_surprise: return the memories' errors ‖M(k) − v̂‖, [B, T] per block.
            cms_weights: by layer index, weights that take the place of the CMS blocks' own in this call, one
                entry per level (None: its own), for all rows or with a leading batch dimension; see
                `ContinuumMemorySystem.forward`. Gradients flow to them. Not where the CMS learns in context.
            learn_mask: [B, T], zero for tokens that are read but that a CMS which learns in context does not
                learn from; None: it learns from all. Memory layers learn from whatever they read.
            lm_head: from the output to logits; needed, with `input_ids`, where the CMS learns from the
                next-token loss (`cms_update="lm"`), and of no use otherwise. `HopeForCausalLM` gives its own.
            output_attentions, position_ids, token_type_ids: only there because callers of any transformers
                model pass them; must be False or None. Positions follow from the mask and the state.

        Raises:
            ValueError: for ids outside of the vocabulary (checked on the CPU only; elsewhere it would wait
                for the device), a mask, a cache or weights that do not fit, what Hope does not have.
        """
        self._refuse_unsupported(output_attentions, position_ids, token_type_ids)
        cms_weights = self._checked_weights(cms_weights)
        x = self._embed(input_ids, inputs_embeds)
        learn = self._checked_learn_mask(learn_mask, x)
        if x.shape[1] == 0:
            raise ValueError("the input has no tokens; give at least one column (a start or padding token)")
        cache = self._cache_for(past_key_values, use_cache, x)
        mask = columns_of_this_call(attention_mask, x, 0 if cache is None else cache.get_seq_length())
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)

        lm_update = self._lm_update(lm_head, input_ids)
        states = {} if cache is None else dict(cache.states)
        size = self.config.segment_size or x.shape[1]
        pieces = []
        for start in range(0, x.shape[1], size):
            columns = slice(start, start + size)
            segment, masked, learned = (None if t is None else t[:, columns] for t in (x, mask, learn))
            assert segment is not None
            wanted = (output_hidden_states, output_surprise)
            if lm_update is None:
                piece, states = self._run_blocks(segment, states, masked, learned, *wanted, cms_weights)
            else:
                assert input_ids is not None
                piece, states = lm_update.read(
                    segment, input_ids[:, columns], states, masked, learned, *wanted
                )
            pieces.append(piece)
        x, hidden, surprise = join(pieces)

        if cache is not None:
            cache.advance(states, input_ids, mask, (x.shape[0], x.shape[1]))
        return HopeModelOutput(
            last_hidden_state=x,
            past_key_values=cache,  # type: ignore[arg-type]
            hidden_states=hidden if output_hidden_states else None,
            surprise=surprise if output_surprise else None,
        )

    def _run_blocks(
        self,
        x: Tensor,
        states: dict[str, State],
        mask: Tensor | None,
        learn: Tensor | None,
        keep_hidden: bool,
        want_surprise: bool,
        cms_weights: CMSWeights,
    ) -> tuple[Piece, dict[str, State]]:
        """All blocks and the final norm on one segment [B, S, D], and the states after it."""
        after: dict[str, State] = {}
        hidden, surprise = [], []
        for index, block in enumerate(self.layers):
            if keep_hidden:
                hidden.append(x)
            names = f"layers.{index}.mixer", f"layers.{index}.cms"
            before = states.get(names[0]), states.get(names[1])
            with check.scope(f"{self.base_model_prefix}.layers.{index}"):
                x, *new, error = block(x, *before, mask, want_surprise, cms_weights.get(index), learn)
            after.update({name: state for name, state in zip(names, new, strict=True) if state is not None})
            surprise.append(error)
        x = self.norm(x)
        if keep_hidden:
            hidden.append(x)
        return (x, tuple(hidden), tuple(surprise)), after

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        size = self.embed_tokens.num_embeddings
        has_values = not (torch.compiler.is_compiling() or isinstance(input_ids, FakeTensor))
        if input_ids.device.type == "cpu" and input_ids.numel() and has_values:
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"token ids must lie in 0..{size - 1} (vocab_size {size}), got {low}..{high}; "
                    "is this the model's own tokenizer? (-100 is for labels)"
                )
        return self.embed_tokens(input_ids)

    def _cache_for(self, given: HopeCache | None, use_cache: bool | None, x: Tensor) -> HopeCache | None:
        if given is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return HopeCache(self.config) if use_cache else None
        if not isinstance(given, HopeCache):
            raise ValueError(f"past_key_values must be a HopeCache, got {type(given).__name__}")
        if given.batch_size not in (None, x.shape[0]):
            raise ValueError(
                f"past_key_values holds {given.batch_size} rows, the input {x.shape[0]}; "
                "use cache.select_rows or cache.batch_repeat_interleave"
            )
        if given.config is not self.config:
            if given.config.fingerprint() != self.config.fingerprint():
                raise ValueError(
                    "past_key_values belongs to a model with another configuration; "
                    "start a new one with HopeCache(model.config)"
                )
            given.config = self.config  # so that the next call need not compare them again
        return given

    def _checked_weights(self, cms_weights: CMSWeights | None) -> CMSWeights:
        for index in cms_weights or {}:
            if index not in range(len(self.layers)):
                raise ValueError(
                    f"cms_weights is keyed by layer index 0..{len(self.layers) - 1}, got {index!r}"
                )
        if cms_weights and self.cms_learns:
            raise ValueError(
                f"cms_weights are for static blocks; with cms_update={self.config.cms_update!r} each row has "
                "weights of its own in the cache"
            )
        return cms_weights or {}

    def _lm_update(self, lm_head: Head | None, input_ids: Tensor | None) -> LMUpdate | None:
        if not (self.cms_learns and self.config.cms_update == "lm"):
            return None
        if lm_head is None:
            raise ValueError(
                "cms_update='lm' learns from the loss of the next token: run HopeForCausalLM, or give lm_head"
            )
        if input_ids is None:
            raise ValueError("cms_update='lm' learns from tokens: give input_ids, not inputs_embeds")
        return LMUpdate(self, lm_head)

    def _checked_learn_mask(self, learn_mask: Tensor | None, x: Tensor) -> Tensor | None:
        if learn_mask is None:
            return None
        if not self.cms_learns:
            raise ValueError(
                "learn_mask is for a CMS that learns in context; this model's does not (cms_update)"
            )
        if learn_mask.shape != x.shape[:2]:
            raise ValueError(
                f"learn_mask must be [batch, tokens] = {list(x.shape[:2])}, got {list(learn_mask.shape)}"
            )
        return learn_mask.bool()

    def _refuse_unsupported(
        self, output_attentions: bool | None, position_ids: Tensor | None, token_type_ids: Tensor | None
    ) -> None:
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "Hope returns no attention weights (memories have none): leave output_attentions at False"
            )
        if position_ids is not None:
            raise ValueError(
                "Hope counts positions itself, from attention_mask and the state: leave position_ids away. "
                "Sequences packed into one row are not kept apart; give each a row of its own"
            )
        if token_type_ids is not None:
            raise ValueError("Hope has no token types: leave token_type_ids away")


class HopeForCausalLM(HopePreTrainedModel, HopeGenerationMixin):
    """Hope with a language-modelling head, tied to the embedding unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # forward takes Trainer's num_items_in_batch

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model = HopeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_surprise: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cms_weights: CMSWeights | None = None,
        learn_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> HopeCausalLMOutput:
        """Logits [B, T, vocab_size] of the next token, and with `labels` the mean cross-entropy in nats.

        Args:
            labels: [B, T] int, unshifted: label t + 1 is compared with logits t; −100 is not counted. The
                loss is float32, float64 for a float64 model; without any label that counts it is 0.
            logits_to_keep: compute logits for the last n positions only (0: all), or for given positions.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels
                (transformers' Trainer passes it for gradient accumulation).
            others: see `HopeModel.forward`.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all positions: leave logits_to_keep at 0")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_surprise=output_surprise,
            cms_weights=cms_weights,
            learn_mask=learn_mask,
            lm_head=self.lm_head,
            output_attentions=output_attentions,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            return_dict=True,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return HopeCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            surprise=outputs.surprise,
        )
