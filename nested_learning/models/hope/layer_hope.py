"""A block of Hope alone, on [B, T, D] or one token per row, with its memories as a value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning._tensor_files import write_tensors
from nested_learning.layers.cms import CMSLevel, CMSState
from nested_learning.layers.token_inputs import as_sequence, find_documents
from nested_learning.memory.state import State, Weights
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.models.hope.cache_file import MOST, FileForm, complete, read_of_model
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.models.hope.expected_states import expected_states
from nested_learning.models.hope.placement_hope import device_of
from nested_learning.models.hope.pretrained_hope import init_module

LAYER_STATE = FileForm("HopeLayerState", "layer state", "nested_learning.hope_layer", "1", {})


@dataclass(frozen=True)
class HopeLayerState(State):
    """The memories of a `HopeLayer`, per row of its batch.

    Attributes:
        mixer: state of the mixer, a `MemoryState` where that is a memory layer; None where it keeps none.
        cms: state of the continuum memory system; None where it does not learn in context.
    """

    mixer: State | None
    cms: CMSState | None

    def to_tensors(self) -> dict[str, Tensor]:
        """As in `State`; the names of the mixer's tensors begin with "mixer." and the class of its state."""
        flat = {} if self.cms is None else {f"cms.{key}": t for key, t in self.cms.to_tensors().items()}
        if self.mixer is not None:
            kind = type(self.mixer).__name__
            flat |= {f"mixer.{kind}.{key}": t for key, t in self.mixer.to_tensors().items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> HopeLayerState:
        """The inverse of `to_tensors`."""
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            field, _, key = name.partition(".")
            kind, _, key = key.partition(".") if field == "mixer" else (CMSState.__name__, "", key)
            parts.setdefault((field, kind), {})[key] = tensor
        found: dict[str, State] = {}
        for (field, kind), tensors in parts.items():
            if field not in ("mixer", "cms") or field in found or kind not in State.registry:
                raise ValueError(
                    f"{cls.__name__} has no {field!r} of class {kind!r}, or has it twice; it has mixer and "
                    f"cms. The file was written by another version or is damaged."
                )
            found[field] = complete(State.registry[kind].from_tensors(tensors), field)
        cms = found.get("cms")
        return cls(found.get("mixer"), cms if isinstance(cms, CMSState) else None)

    def save(self, path: str | os.PathLike[str], layer: HopeLayer) -> None:
        """Write the state to one safetensors file, under a temporary name first.

        Args:
            path: path of the file.
            layer: the layer it is a state of; the file has its configuration's fingerprint.

        Raises:
            ValueError: the state is empty, or the path is that of a folder, a device or a pipe.
            OSError: the file cannot be written; nothing is left behind.
        """
        tensors = self.to_tensors()
        if not tensors:
            raise ValueError(f"the state is empty: a {layer.config.mixer!r} layer has no memories to save")
        # Fields may share memory (an anchor is the current weight until the next boundary); files may not.
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {
            "format": LAYER_STATE.format,
            "version": LAYER_STATE.version,
            "fingerprint": layer.config.fingerprint(),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], layer: HopeLayer, device: torch.device | str | None = None
    ) -> HopeLayerState:
        """Read a state that `save` wrote, checked as `HopeCache.load` checks its file.

        Args:
            path: path of the file.
            layer: the layer that goes on from the state.
            device: where the tensors go; None: where the layer computes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another format version or of a layer with another configuration.
        """
        tensors, _ = read_of_model(path, LAYER_STATE, layer.config)
        try:
            state = cls.from_tensors(tensors)
            layer.check_tensors(state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return state.to(device_of(layer) if device is None else device)


class HopeLayer(nn.Module):
    """One block of Hope (arXiv 2512.24695, §8.3) as a layer: x ← x + mixer(RMSNorm(x)), then x ← CMS(x).

    The block is that of `HopeModel`, with the same names of parameters below `block`. Its memories go in and
    come out as a value: no call writes to a parameter or a buffer, rows of a batch are independent, and a
    sequence in any pieces gives what it gives whole. Gradients flow through the state.

    Args:
        hidden_size: width D of input and output.
        num_heads: heads of the mixer; must divide `hidden_size`.
        mixer: name of a registered mixer.
        mixer_options: keyword arguments of the mixer, keyed by its name as in `HopeConfig`.
        cms_levels, cms_variant, cms_nested_gradient, cms_activation, cms_expansion: as in `HopeConfig`.
        cms_update: "none" or "regression". What a CMS would learn from with "lm" is the loss of the next
            token, which a layer alone does not have.
        norm_eps, initializer_scale, recompute, compile_step: as in `HopeConfig`.

    Attributes:
        config: `HopeConfig` of a model of this one block; its fingerprint is that of saved states.
        block: the `HopeBlock`.

    Raises:
        ValueError: as `HopeConfig`, and for cms_update "lm".
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        mixer: str = "self_modifying_titans",
        mixer_options: dict[str, dict[str, Any]] | None = None,
        cms_levels: Sequence[Mapping[str, Any] | CMSLevel] | None = None,
        cms_variant: str = "sequential",
        cms_update: str = "none",
        cms_nested_gradient: str = "first_order",
        cms_activation: str = "relu2",
        cms_expansion: float = 4.0,
        norm_eps: float = 1e-6,
        initializer_scale: float = 0.5,
        recompute: str | None = None,
        compile_step: bool = False,
    ) -> None:
        super().__init__()
        if cms_update == "lm":
            raise ValueError(
                "cms_update='lm' learns from the loss of the next token, for which a layer alone has no "
                "head: take cms_update='regression', or a HopeForCausalLM"
            )
        if not isinstance(mixer, str):
            raise ValueError(f"mixer of a HopeLayer is one name, got {mixer!r}")
        self.config = HopeConfig(
            vocab_size=1,
            num_hidden_layers=1,
            hidden_size=hidden_size,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            cms_levels=None if cms_levels is None else list(cms_levels),
            cms_variant=cms_variant,
            cms_update=cms_update,
            cms_nested_gradient=cms_nested_gradient,
            cms_activation=cms_activation,
            cms_expansion=cms_expansion,
            norm_eps=norm_eps,
            initializer_scale=initializer_scale,
            recompute=recompute,
            compile_step=compile_step,
        )
        self.block = HopeBlock(self.config, 0)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: HopeConfig, layer_index: int = 0) -> HopeLayer:
        """A new layer like block `layer_index` of a model with this configuration.

        Its weights are new ones: `layer.block.load_state_dict(model.model.layers[layer_index].state_dict())`.

        Raises:
            ValueError: there is no such block, or its CMS learns from the next-token loss.
        """
        if layer_index not in range(config.num_hidden_layers):
            raise ValueError(
                f"layer_index must be a block of the model, 0..{config.num_hidden_layers - 1}, "
                f"got {layer_index!r}"
            )
        mixer = config.layer_mixers[layer_index]
        options = config.options_of(mixer)
        names = (
            "hidden_size",
            "num_heads",
            "cms_levels",
            "cms_variant",
            "cms_update",
            "cms_nested_gradient",
            "cms_activation",
            "cms_expansion",
            "norm_eps",
            "initializer_scale",
        )
        fields: dict[str, Any] = {name: getattr(config, name) for name in names}
        return cls(mixer=mixer, mixer_options={mixer: options} if options else None, **fields)

    def reset_parameters(self) -> None:
        """Initialise every parameter as in a `HopeModel`."""
        self.block.apply(lambda module: init_module(module, self.config))

    def forward(
        self,
        x: Tensor,
        state: HopeLayerState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
        learn: Tensor | None = None,
        documents: Tensor | None = None,
        position_ids: Tensor | None = None,
        cms_weights: Sequence[Weights | None] | None = None,
    ) -> tuple[Tensor, HopeLayerState] | tuple[Tensor, HopeLayerState, Tensor]:
        """Read a sequence, several documents in a row, or one token of each row, learning from it.

        Args:
            x: [B, T, D], or [B, D]: one token per row, read as [B, 1, D] is. Of the weights' dtype; the
                memories run in float32 (float64 for float64).
            state: from an earlier call on the same rows; None starts from the initial memories.
            mask: [B, T] bool ([B] for one token), True = real token. A padded token changes nothing, whatever
                it holds, and its output is zero.
            return_surprise: also return the error ‖M(k) − v̂‖ of the mixer's memory, of mask's shape.
            learn: bool of mask's shape, False = read, but not learned from by the CMS; None: it learns from
                all. Only where it learns in context; the mixer learns from whatever it reads.
            documents, position_ids: [B, T] or [1, T] int, where documents in a row begin, as in
                `MemoryLayer.forward`; for [B, T, D] alone.
            cms_weights: per level, weights in the place of the CMS blocks' own, see
                `ContinuumMemorySystem.forward`; not where it learns in context.

        Returns: y of x's shape and dtype, the state after the tokens, and the surprise if asked for.

        Raises:
            ValueError: when an argument does not fit x, the state or the layer.
        """
        one = x.dim() == 2
        self._check(state, learn, x.shape[:-1], return_surprise)
        if one and not (documents is position_ids is None):
            raise ValueError(
                "x [B, D] is one token per row, in which no second document begins: leave documents and "
                "position_ids away, or give x as [B, T, D]"
            )
        x, real = as_sequence(x, self.config.hidden_size, mask, self.block.mixer_norm)
        if learn is not None and one:
            learn = learn.unsqueeze(1)
        packed = find_documents(x, real, state is not None, documents, position_ids)
        before = (None, None) if state is None else (state.mixer, state.cms)
        options = {"return_surprise": True} if return_surprise else {}
        y, after, *surprise = self.block(x, before, real, learn, cms_weights, packed, **options)
        if real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)
        new = HopeLayerState(*after)
        if one:
            y, surprise = y.squeeze(1), [s.squeeze(1) for s in surprise]
        return (y, new, *surprise)

    def check_tensors(self, state: HopeLayerState) -> None:
        """ValueError unless every tensor of a state has the kind, shape and range that this layer's have."""
        expected = expected_states(self.config)
        rows = {len(t) if t.dim() else -1 for t in state.tensors()}
        if len(rows) != 1:
            raise ValueError(f"its tensors have {sorted(rows)} rows")
        for name, part in (("mixer", state.mixer), ("cms", state.cms)):
            wanted = expected.get(f"layers.0.{name}")
            kinds = [kind.__name__ for kind in (type(part), getattr(wanted, "kind", type(None)))]
            if kinds[0] != kinds[1]:
                raise ValueError(f"state {name} is a {kinds[0]}, the layer's is a {kinds[1]}")
            if part is not None and wanted is not None:
                wanted.check(name, part.to_tensors(), MOST)

    def extra_repr(self) -> str:
        return f"{self.config.hidden_size}, mixer={self.config.mixer!r}"

    def _check(
        self, state: HopeLayerState | None, learn: Tensor | None, shape: torch.Size, surprise: bool
    ) -> None:
        """ValueError for options that this layer does not have, and for a state of another kind."""
        if state is not None and not isinstance(state, HopeLayerState):
            raise ValueError(f"state must be a HopeLayerState, got {type(state).__name__}")
        learns = self.block.cms.learns
        if state is not None and (state.cms is not None) != learns:
            has, needs = ("has none", "learns") if learns else ("has one", "does not learn")
            raise ValueError(
                f"state {has} of a CMS, and this layer's CMS {needs} in context (cms_update): it belongs to "
                "another layer"
            )
        if learn is not None:
            if not learns:
                raise ValueError(
                    "learn is for a CMS that learns in context; this layer's does not (cms_update)"
                )
            if learn.shape != shape or learn.dtype != torch.bool:
                raise ValueError(f"learn must be bool {tuple(shape)}, got {learn.dtype} {tuple(learn.shape)}")
        if surprise and not getattr(self.block.mixer, "has_surprise", False):
            raise ValueError(f"mixer {self.config.mixer!r} has no surprise: leave return_surprise at False")
