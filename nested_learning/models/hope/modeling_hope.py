"""Hope (arXiv 2512.24695, §8.3): blocks of a sequence mixer and a continuum memory system."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from nested_learning.layers.token_inputs import RMSNorm, find_documents
from nested_learning.models.hope.auto_hope import list_as_causal_lm
from nested_learning.models.hope.block_hope import Blocks, CMSWeights, HopeBlock, Tokens, join
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.models.hope.compiled_hope import CompiledBlocks
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.generation_hope import HopeGenerationMixin
from nested_learning.models.hope.keywords_hope import (
    ID_DTYPES,
    check_keywords,
    check_positions,
    wrong_input,
)
from nested_learning.models.hope.lm_update import Head, LMUpdate
from nested_learning.models.hope.loss_hope import causal_lm_loss
from nested_learning.models.hope.pretrained_hope import HopePreTrainedModel
from nested_learning.ops.context import has_values


@dataclass
class HopeModelOutput(BaseModelOutputWithPast):
    """As `BaseModelOutputWithPast`; `surprise` has one [B, T] per block, None where the mixer has none."""

    surprise: tuple[Tensor | None, ...] | None = None


@dataclass
class HopeCausalLMOutput(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`; `surprise` has one [B, T] per block, None where the mixer has none."""

    surprise: tuple[Tensor | None, ...] | None = None


class HopeModel(HopePreTrainedModel):
    """Embedding, blocks and final norm, without a head."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HopeBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
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
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        compiled: CompiledBlocks | None = None,
        **others: Any,
    ) -> HopeModelOutput:
        """Run the blocks over new tokens. Long: it describes every argument that transformers passes.

        Args:
            input_ids: [B, T] int; or `inputs_embeds` [B, T, D] instead.
            attention_mask: [B, T], or [B, S + T] where the cache has seen S columns, of which the last T
                count; nonzero marks a real token. A masked token changes no state and no other token's
                output.
            past_key_values: continue from this cache, of this model or one with the same configuration; it is
                advanced in place and returned.
            use_cache: return a cache (default: `config.use_cache`, but not while training or exporting).
            output_hidden_states: return the embedding's output and each block's, the last one normalised.
            output_surprise: return the memories' errors ‖M(k) − v̂‖, [B, T] per block.
            cms_weights: by layer index, weights that take the place of the CMS blocks' own in this call, one
                entry per level (None: its own), for all rows or with a leading batch dimension; see
                `ContinuumMemorySystem.forward`. Gradients flow to them. Not where the CMS learns in context.
            learn_mask: [B, T], zero for tokens that are read but that a CMS which learns in context does not
                learn from; None: it learns from all. Memory layers learn from whatever they read.
            lm_head: from the output to logits; needed, with `input_ids`, where the CMS learns from the
                next-token loss (`cms_update="lm"`), and of no use otherwise. `HopeForCausalLM` gives its own;
                None: the embedding, where the configuration ties it to the head.
            output_attentions: must be False or None; memories have no attention weights.
            position_ids: [B, T] or [1, T]; a real token at position 0 begins a document, which nothing of an
                earlier one in its row reaches, nor anything of the cache. Other positions are not read: a
                document's tokens are counted, from the cache where it goes on from there.
            seq_idx: [B, T] int, constant within a document, another in the next one. A row's first document
                goes on from the cache, if there is one; so with `cu_seq_lens_q`.
            cu_seq_lens_q, cu_seq_lens_k: [documents + 1] int, where one row of T tokens is cut into
                documents, from 0 to T. Both are the same; `max_length_q`, `max_length_k` are of no use here.
            compiled: runs the blocks where they read one token of each row (`get_compiled_call`).
            others: keywords of other models, which change nothing (`cache_position`, `num_items_in_batch`).

        Raises:
            ValueError: for ids outside of the vocabulary (checked on the CPU only; elsewhere it would wait
                for the device), a mask, a cache or weights that do not fit, what Hope does not have.
            TypeError: for a keyword that looks like a typo.
        """
        if lm_head is None and self.config.tie_word_embeddings:
            lm_head = self._tied_head
        self._check_options(cms_weights, learn_mask, lm_head, output_attentions, use_cache, others)
        self._check_tokens(input_ids, inputs_embeds, attention_mask, learn_mask, past_key_values)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        # A mask may cover all columns so far; those of this call are the last.
        real = None if attention_mask is None else attention_mask[:, -length:].bool()
        if position_ids is not None:
            check_positions(position_ids, x, real)
        learn = None if learn_mask is None else learn_mask.bool()
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or torch.compiler.is_exporting())
        cache = HopeCache(self.config) if past_key_values is None and use_cache else past_key_values
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)

        blocks = Blocks(
            cast("list[HopeBlock]", self.layers),
            self.norm,
            output_hidden_states,
            output_surprise,
            cms_weights or {},
            compiled=compiled,
        )
        reader: Blocks | LMUpdate = blocks
        if self.cms_learns and self.config.cms_update == "lm":
            assert lm_head is not None
            exact = self.config.cms_meta_gradient == "exact"
            reader = LMUpdate(blocks, self.embed_tokens, lm_head, exact)
        states = {} if cache is None else cache.states
        if torch.is_grad_enabled():
            states = {name: state.recordable() for name, state in states.items()}
        documents, said = None, (position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        if any(each is not None for each in said):
            documents = find_documents(x, real, bool(states), None, *said, cache is not None)
        size = self.config.segment_size or length
        tokens, pieces = Tokens(x, input_ids, real, learn, documents), []
        # without segments no look at the length, which torch.export may leave open
        for start in range(0, length, size) if self.config.segment_size else (0,):
            piece, states = reader.read(tokens.columns(start, start + size), states)
            pieces.append(piece)
        result = join(pieces)

        if cache is not None:
            if cache.recording is not None:
                cache.recording.add(cache, tokens, reader)
            # As they will be after single tokens, for which a compiler is to make one graph; not elsewhere,
            # where what fields share need not be held twice.
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                states = {name: state.unshared() for name, state in states.items()}
            cache.advance(states, x, input_ids, real)
        return HopeModelOutput(
            last_hidden_state=result.y,
            past_key_values=cache,  # type: ignore[arg-type]
            hidden_states=result.hidden if output_hidden_states else None,
            surprise=result.surprise if output_surprise else None,
        )

    def _tied_head(self, y: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] of y [B, T, D], by the embedding's weights."""
        weight = self.embed_tokens.weight
        if weight.device != y.device:  # accelerate brings them when the embedding is called, to where it is
            weight = self.embed_tokens(torch.arange(len(weight), device=y.device)).to(y.device)
        return F.linear(y, weight)

    def _check_options(
        self,
        cms_weights: CMSWeights | None,
        learn_mask: Tensor | None,
        lm_head: Head | None,
        output_attentions: bool | None,
        use_cache: bool | None,
        others: dict[str, Any],
    ) -> None:
        """ValueError for options that Hope, or a model with this configuration, does not have."""
        if others:
            check_keywords(others, _ARGUMENTS)
        if use_cache and torch.compiler.is_exporting():
            raise ValueError(
                "use_cache is True, but a program of torch.export returns tensors and no HopeCache: leave it "
                "out, or give use_cache=False, and export the whole sequence"
            )
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "Hope returns no attention weights (memories have none): leave output_attentions at False"
            )
        for index in cms_weights or {}:
            if index not in range(len(self.layers)):
                raise ValueError(
                    f"cms_weights is keyed by layer index 0..{len(self.layers) - 1}, got {index!r}"
                )
        update = self.config.cms_update
        if cms_weights and self.cms_learns:
            raise ValueError(
                f"cms_weights are for static blocks; with cms_update={update!r} each row has "
                "weights of its own in the cache"
            )
        if learn_mask is not None and not self.cms_learns:
            raise ValueError(
                "learn_mask is for a CMS that learns in context; this model's does not (cms_update)"
            )
        if self.cms_learns and update == "lm" and lm_head is None:
            raise ValueError(
                "cms_update='lm' learns from the loss of the next token, for which this model has no head: "
                "run HopeForCausalLM, give lm_head, or set tie_word_embeddings"
            )

    def _check_tokens(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        learn_mask: Tensor | None,
        cache: HopeCache | None,
    ) -> None:
        """ValueError for ids outside of the vocabulary, and for masks and a cache that do not fit them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is None and self.cms_learns and self.config.cms_update == "lm":
            raise ValueError("cms_update='lm' learns from tokens: give input_ids, not inputs_embeds")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        width = self.config.hidden_size if input_ids is None else None
        if not isinstance(given, Tensor) or given.dim() != (2 if width is None else 3):
            raise wrong_input(given, width)
        if given.dtype not in ID_DTYPES if width is None else given.shape[2] != width:
            raise wrong_input(given, width)
        for name, mask in (("attention_mask", attention_mask), ("learn_mask", learn_mask)):
            if mask is not None and not isinstance(mask, Tensor):
                raise ValueError(f"{name} must be a tensor [batch, tokens], got {type(mask).__name__}")
        rows, length = given.shape[:2]
        if length == 0:
            raise ValueError("the input has no tokens; give at least one column (a start or padding token)")
        if input_ids is not None and has_values(input_ids):
            low, high = (int(bound) for bound in input_ids.aminmax())
            size = self.config.vocab_size
            if low < 0 or high >= size:
                raise ValueError(
                    f"token ids must lie in 0..{size - 1} (vocab_size {size}), got {low}..{high}; "
                    "is this the model's own tokenizer? (-100 is for labels)"
                )
        if cache is not None:
            if not isinstance(cache, HopeCache):
                raise ValueError(f"past_key_values must be a HopeCache, got {type(cache).__name__}")
            cache.check(self.config, rows)
        shapes = [[rows, length]]
        if cache is not None and attention_mask is not None and list(attention_mask.shape) not in shapes:
            # A compiler would make a graph for each number of columns.
            compiling = torch.compiler.is_compiling()
            seen = attention_mask.shape[1] - length if compiling else cache.get_seq_length()
            shapes += [[rows, seen + length]] if seen > 0 else []
        if attention_mask is not None and list(attention_mask.shape) not in shapes:
            raise ValueError(
                f"attention_mask must be [batch, tokens] = {' or '.join(map(str, shapes))} (the new columns, "
                f"or those in the cache too), got {list(attention_mask.shape)}"
            )
        if learn_mask is not None and learn_mask.shape != given.shape[:2]:
            raise ValueError(
                f"learn_mask must be [batch, tokens] = {[rows, length]}, got {list(learn_mask.shape)}"
            )


# Arguments of both models: what a keyword may be a typo of.
_ARGUMENTS = frozenset(inspect.signature(HopeModel.forward).parameters) - {"self", "others"} | {
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "return_dict",
    "shift_labels",
}


class HopeForCausalLM(HopePreTrainedModel, HopeGenerationMixin):
    """Hope with a language-modelling head, tied to the embedding unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # forward takes Trainer's num_items_in_batch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        list_as_causal_lm(cls)

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # that the loss shifts the labels, also in a subclass of any name
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
        **others: Any,
    ) -> HopeCausalLMOutput:
        """Logits [B, T, vocab_size] of the next token, and with `labels` the mean cross-entropy in nats.

        Long: it names every argument of `HopeModel.forward` and hands them on.

        Args:
            labels: [B, T] int, unshifted: label t + 1 is compared with logits t; −100 is not counted. The
                loss is float32, float64 for a float64 model; without any label that counts it is 0.
            logits_to_keep: compute logits for the last n positions only (0: all), or for given positions.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels
                (transformers' Trainer passes it for gradient accumulation).
            others: `shift_labels`, [B, T] int, labels that are shifted already: label t is compared with
                logits t. They take the place of `labels` (as sequence-parallel training needs it, where the
                row goes on elsewhere). Not among the arguments, or Trainer would expect them of any dataset.
            The rest: see `HopeModel.forward`.
        """
        shift_labels = others.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        kept = logits_to_keep
        if isinstance(kept, (float, str)) or (isinstance(kept, int) and kept < 0):
            raise ValueError(
                "logits_to_keep must be a number of last positions, 0 for all, or a tensor of positions, "
                f"got {kept!r}"
            )
        if has_labels and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
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
            lm_head=partial(self.lm_head),  # no module, which accelerate's hooks would move
            output_attentions=output_attentions,
            position_ids=position_ids,
            return_dict=True,
            **others,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return HopeCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            surprise=outputs.surprise,
        )


list_as_causal_lm(HopeForCausalLM)
