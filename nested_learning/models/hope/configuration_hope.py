"""Configuration of the Hope family: embedding, N blocks of mixer and continuum memory system, head."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
from typing import Any, ClassVar

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from nested_learning._checks import LARGEST, fits, shown
from nested_learning._errors import unknown
from nested_learning.layers.cms import CMSLevel, ContinuumMemorySystem
from nested_learning.layers.cms.level import learning_levels, parse_levels
from nested_learning.layers.memory import set_compile_step, set_recompute
from nested_learning.layers.registry import MIXERS, check_mixer_options
from nested_learning.models.hope.adapters_hope import tell_peft
from nested_learning.models.hope.auto_hope import auto_map, write_code
from nested_learning.models.hope.checks_hope import (
    LARGEST_SIZES,
    check_numbers,
    check_shared_fields,
    refusals,
)
from nested_learning.models.hope.meta_hope import built_on_meta

# Keys without a dataclass field that PreTrainedConfig itself understands, or that config.json may hold.
_BASE_KEYS = frozenset(
    (
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "task_specific_params",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "transformers_weights",
    )
)
# Fields that a saved state depends on; the rest (vocabulary, initialisation, caching, segments) may differ.
_STATE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "cms_variant",
    "cms_update",
    "cms_activation",
    "cms_expansion",
    "norm_eps",
)
META_GRADIENTS = ("first_order", "exact")
# Options whose default None stands for the value of another option or field.
_SAME_AS = {
    "projection_chunk_size": "chunk_size",
    "projection_eta_max": "eta_max",
    "num_kv_heads": "num_heads",
}


class HopeConfig(PreTrainedConfig):
    """Everything that decides a Hope model's shape and computation.

    With `mixer="attention"` it is Hope-Attention, with one CMS level only a pre-norm Transformer.

    Args:
        vocab_size: number of tokens.
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        num_heads: heads of every mixer; must divide `hidden_size`. Also readable as `num_attention_heads`.
        mixer: name of a registered mixer, or a list with one name per block.
        mixer_options: keyword arguments of the mixers, keyed by mixer name.
        cms_levels: levels of the continuum memory system, fast to slow: `CMSLevel` objects or dicts of
            their fields (kept as dicts). Default: chunk sizes 512 and 2048. With [] a block is its mixer
            alone, without an MLP: cms_variant and cms_update stay at their defaults then.
        cms_variant, cms_update: see `ContinuumMemorySystem`; how fast a level learns in context is said at
            the level.
        cms_meta_gradient: what training sees of the writes of `cms_update="lm"`: with "first_order" a written
            gradient is a constant, with "exact" a function of weights, states and embeddings, at the cost of
            second derivatives. Changes no output.
        cms_nested_gradient: how `cms_variant="nested"` learns initial states: "first_order" or, with
            `cms_update="regression"`, "exact"; see `ContinuumMemorySystem`.
        cms_activation: activation of the levels that name none: "relu2", "gelu" or "swiglu".
        cms_expansion: hidden width of all levels together, as a multiple of `hidden_size`, in equal parts.
        norm_eps: epsilon of the RMS norms of the blocks, the CMS and the output. The norms inside a mixer
            have their own: attention's is an option of it, a memory layer's is fixed.
        initializer_scale: a linear layer starts with standard deviation initializer_scale / √fan_in. Memory
            layers initialise all that is inside them themselves.
        tie_word_embeddings: the head uses the embedding's weights.
        use_cache: return `past_key_values` when not training.
        segment_size: run all blocks on this many tokens, then on the next ones with the state carried over;
            None runs a call's tokens at once. Changes no result. It bounds the activations of a long input
            without gradients; with gradients all segments' activations are kept all the same, and several
            short passes take longer than a long one.
        recompute: "chunk" lets the memory layers keep little for the backward pass and compute the chunks
            there again; see `layers.set_recompute`. None keeps everything. Changes no result.
        compile_step: run the chunks of memories through torch.compile; see `layers.set_compile_step`.
        pad_token_id, bos_token_id, eos_token_id: None where there is none.

    Raises:
        ValueError: for unknown keys (with the nearest valid one), mixers, options, and sizes that do not fit.
    """

    model_type: ClassVar[str] = "hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    vocab_size: int = 32_000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    mixer: str | list[str] = "self_modifying_titans"
    mixer_options: dict[str, dict[str, Any]] | None = None
    cms_levels: list[Any] | None = None
    cms_variant: str = "sequential"
    cms_update: str = "none"
    cms_meta_gradient: str = "first_order"
    cms_nested_gradient: str = "first_order"
    cms_activation: str = "relu2"
    cms_expansion: float = 4.0
    norm_eps: float = 1e-6
    initializer_scale: float = 0.5
    tie_word_embeddings: bool = True
    use_cache: bool = True
    segment_size: int | None = None
    recompute: str | None = None
    compile_step: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.mixer_options is None:
            self.mixer_options = {}
        if self.cms_levels is None:
            self.cms_levels = [{"chunk_size": 512}, {"chunk_size": 2048}]
        if isinstance(self.cms_levels, (list, tuple)):
            self.cms_levels = [_plain(level) for level in self.cms_levels]
        kwargs["auto_map"] = auto_map(kwargs.get("auto_map"))
        check_shared_fields({**vars(self), **kwargs})
        with refusals("a field that every configuration of transformers has"):
            super().__post_init__(**kwargs)
        self.validate()

    @property
    def layer_mixers(self) -> list[str]:
        """The mixer's name for each block."""
        if isinstance(self.mixer, str):
            return [self.mixer] * self.num_hidden_layers
        return list(self.mixer)

    @property
    def state_names(self) -> list[str]:
        """Names of the states that a `HopeCache` of this model holds: per mixer, and per CMS that learns.

        With `cms_update="lm"` also the mixers' states at the start of the running chunk, and its tokens.
        """
        kinds, common = ["mixer"], []
        if self.cms_learns:
            kinds.append("cms")
            if self.cms_update == "lm":
                kinds.append("start")
                common.append("pending")
        names = [f"layers.{index}.{kind}" for index in range(self.num_hidden_layers) for kind in kinds]
        return names + common

    @property
    def cms_learns(self) -> bool:
        """Whether a level of the continuum memory systems learns in context."""
        return bool(learning_levels(parse_levels(self.cms_levels or []), self.cms_variant, self.cms_update))

    def options_of(self, mixer: str) -> dict[str, Any]:
        """The options given for a mixer."""
        return dict((self.mixer_options or {}).get(mixer, {}))

    def validate(self) -> None:
        """Check the whole configuration; also called when a model is built and when it is saved.

        Raises:
            ValueError: saying what was given, what is expected and how to fix it.
        """
        check_shared_fields(vars(self))
        with refusals("a field that every configuration of transformers has"):
            super().validate()  # type: ignore[misc]
        for name in ("mixer_options", "cms_levels"):
            check_numbers(name, getattr(self, name))
        self._check_sizes()
        self._check_mixers()
        with refusals("the continuum memory system"):
            built_on_meta(ContinuumMemorySystem, **self._of_cms())
        if self.cms_meta_gradient not in META_GRADIENTS:
            raise unknown("cms_meta_gradient:", str(self.cms_meta_gradient), META_GRADIENTS)
        if self.cms_meta_gradient == "exact" and self.cms_update != "lm":
            raise ValueError(
                f"cms_meta_gradient 'exact' belongs to cms_update 'lm', not to {self.cms_update!r}: training "
                "differentiates the writes of 'regression' exactly anyway, and 'none' writes nothing"
            )

    def build_cms(self) -> ContinuumMemorySystem:
        """The continuum memory system of one block."""
        return ContinuumMemorySystem(**self._of_cms())

    def fingerprint(self) -> str:
        """sha256 (hex) over the fields that decide what a state means: not the weights, not the vocabulary.

        Only options that differ from their defaults enter, and numbers by value: leaving an option away or
        giving its default is the same, and so are 1 and 1.0.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in _STATE_FIELDS}
        if self.cms_nested_gradient != "first_order":
            fields["cms_nested_gradient"] = self.cms_nested_gradient
        fields["cms_levels"] = [level.unusual() for level in parse_levels(self.cms_levels or [])]
        fields["mixers"] = self.layer_mixers
        fields["mixer_options"] = {name: self._unusual_options(name) for name in set(self.layer_mixers)}
        return hashlib.sha256(json.dumps(_by_value(fields), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; peft, which asks for it first of all, is told what adapters take by default."""
        tell_peft(self.model_type)
        fields: dict[str, Any] = super().to_dict()
        return fields

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers; beside config.json a few lines of code, for `trust_remote_code=True`."""
        self.validate()
        if not os.path.isfile(save_directory):
            write_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """As in transformers for classes elsewhere; the code of this package is not copied into folders."""
        if not cls.__module__.startswith("nested_learning."):
            super().register_for_auto_class(auto_class)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but overrides are validated too, and unknown ones refused, not dropped."""
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, **kwargs, return_unused_kwargs=True)
        config.validate()
        if wants_unused:
            return config, unused
        for key in unused:
            if key not in ("dtype", "torch_dtype", "gguf_file") and not key.startswith("_"):
                raise unknown("key of HopeConfig:", key, cls._field_names())
        return config

    @classmethod
    def _field_names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)] + list(cls.attribute_map)

    def _refuse_unknown(self, extra: dict[str, Any]) -> None:
        for key in extra:
            if key in _BASE_KEYS or key in self.attribute_map:
                continue
            if key in GenerationConfig._get_default_generation_params():
                raise ValueError(
                    f"{key!r} is a setting of generation, not of the model: pass it to model.generate() "
                    "or set it in model.generation_config"
                )
            raise unknown("key of HopeConfig:", key, self._field_names())

    def _of_cms(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "levels": self.cms_levels or [],
            "variant": self.cms_variant,
            "update": self.cms_update,
            "activation": self.cms_activation,
            "expansion": self.cms_expansion,
            "norm_eps": self.norm_eps,
            "nested_gradient": self.cms_nested_gradient,
        }

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "segment_size"):
            value = getattr(self, name)
            if not (fits(value, int) and value > 0) and not (name == "segment_size" and value is None):
                raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
            if value is not None and value > (most := LARGEST_SIZES.get(name, LARGEST)):
                raise ValueError(f"{name} must be a positive integer, at most {most:,}, got {shown(value)}")
        for name in ("norm_eps", "initializer_scale", "cms_expansion"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_heads ({self.num_heads}): "
                "change one of them so that every head has the same whole width"
            )

    def _check_mixers(self) -> None:
        if not isinstance(self.mixer, (str, list, tuple)) or not all(isinstance(m, str) for m in self.mixer):
            raise ValueError(f"mixer must be a name or a list of names, got {self.mixer!r}")
        mixers = self.layer_mixers
        if len(mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixer lists {len(mixers)} blocks, num_hidden_layers is {self.num_hidden_layers}; "
                "give one name per block, or a single name for all"
            )
        options = self.mixer_options
        if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
            raise ValueError(
                "mixer_options is keyed by mixer name, such as {'attention': {'qk_norm': False}}, "
                f"got {options!r}"
            )
        for name in sorted({*mixers, *options}):
            check_mixer_options(name, self.options_of(name))
        for name in options:
            if name not in mixers:
                used = ", ".join(sorted(set(mixers)))
                raise ValueError(f"mixer_options has options for {name!r}, which no block uses; used: {used}")
        layers = [self._build_on_meta(name) for name in sorted(set(mixers))]
        if sum(set_recompute(layer, self.recompute) for layer in layers) == 0 and self.recompute is not None:
            raise ValueError(
                f"recompute={self.recompute!r} is for memory layers, but no block has one (mixers: "
                f"{', '.join(sorted(set(mixers)))}); leave it at None, or use gradient checkpointing"
            )
        if sum(set_compile_step(layer, self.compile_step) for layer in layers) == 0 and self.compile_step:
            raise ValueError(
                "compile_step=True is for memory layers, but no block has one (mixers: "
                f"{', '.join(sorted(set(mixers)))}); leave it at False"
            )

    def _build_on_meta(self, name: str) -> nn.Module:
        """The layer knows best which values it accepts: build it without memory and let it complain."""
        options = self.options_of(name)
        with refusals(f"mixer {name!r} with options {shown(options)}", always=True):
            sizes = {"hidden_size": self.hidden_size, "num_heads": self.num_heads}
            return built_on_meta(MIXERS[name], **sizes, **options)

    def _unusual_options(self, name: str) -> dict[str, Any]:
        """The options of a mixer that differ from its defaults."""
        parameters = inspect.signature(MIXERS[name]).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        given = self.options_of(name)
        resolved = {**defaults, "num_heads": self.num_heads, **given}
        for option, other in _SAME_AS.items():
            if option in given and given[option] == resolved.get(other):
                given[option] = None
        return {key: value for key, value in given.items() if key not in defaults or value != defaults[key]}


def _plain(level: Any) -> Any:
    """A `CMSLevel` as the dict that config.json holds; anything else unchanged."""
    if not isinstance(level, CMSLevel):
        return level
    return {name: value for name, value in dataclasses.asdict(level).items() if value is not None}


def _by_value(fields: Any) -> Any:
    """Numbers as floats, so that 1 and 1.0 are written alike."""
    if isinstance(fields, dict):
        return {key: _by_value(value) for key, value in fields.items()}
    if isinstance(fields, (list, tuple)):
        return [_by_value(value) for value in fields]
    return float(fields) if isinstance(fields, int) and not isinstance(fields, bool) else fields
