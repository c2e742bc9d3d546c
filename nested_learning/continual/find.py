"""The weights of a pretrained model that learn: the MLP matrices, found by structure, or modules by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nested_learning._errors import unknown


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that levels may put a delta on: a matrix, or a stack of them, one per expert.

    Args:
        name: name of the weight in the model's state_dict.
        module: module that has the weight: an nn.Linear, GPT-2's Conv1D, or the experts of a mixture.
        weight: the pretrained parameter: [out, in] or [in, out], stacked [E, out, in] or [E, in, out].
        layer: index of the layer it belongs to.
        parameter: name of the weight in the module.
        transposed: whether the weight is [in, out] or [E, in, out].
    """

    name: str
    module: nn.Module
    weight: Tensor
    layer: int
    parameter: str = "weight"
    transposed: bool = False

    @property
    def stack(self) -> tuple[int, ...]:
        """(E,) of stacked experts, () of a single matrix."""
        return tuple(self.weight.shape[:-2])

    @property
    def features(self) -> tuple[int, int]:
        """(in, out) of the map."""
        if isinstance(self.module, nn.Linear):  # quantised weights may be packed into another shape
            return self.module.in_features, self.module.out_features
        rows, columns = self.weight.shape[-2:]
        return (rows, columns) if self.transposed else (columns, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a delta in the weight's layout."""
        inputs, outputs = self.features
        return (*self.stack, *((inputs, outputs) if self.transposed else (outputs, inputs)))


def find_targets(model: Any, modules: Sequence[str] | None = None) -> list[Target]:
    """The weights to learn, in the order of the model.

    By structure: the model's layers are the members of those ModuleLists of which one at least has an
    attention module; of each layer the linear maps outside of attention and recurrence that lead from the
    hidden width to another (or to twice it, where gate and up are fused), and from there back, are its MLP.
    So are such maps of stacked experts, 3-D parameters of a module. A recurrent mixer is a module with a
    convolution along the tokens; in a model whose layers have no MLP, its maps from and to the hidden width
    are what learns.

    Args:
        model: a transformers causal language model.
        modules: names of linear modules instead, or the ends of names: `["mlp.up_proj"]` takes that module
            of every layer, `["experts.down_proj"]` that parameter of all experts. A module's layer is the
            first number in its name.

    Raises:
        ValueError: no MLP is found, or a name fits no linear module; the message lists the candidates.
    """
    maps = _linear_maps(model)
    if modules is None:
        chosen = _mlp_maps(model, maps)
    else:
        chosen = {name: maps[name] for name in _matching(maps, modules)}
    numbered = {name: _layer_number(name) for name in chosen}
    layers = sorted(set(numbered.values()))
    return [replace(target, layer=layers.index(numbered[name])) for name, target in chosen.items()]


def _linear_maps(model: nn.Module) -> dict[str, Target]:
    """Matrices that the model multiplies with, by the name of their module, or of their parameter where it
    has another name than "weight"; the adapters beside a `base_layer` are not among them."""
    maps: dict[str, Target] = {}
    adapters: list[str] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            adapters.append(f"{name}.")
        beside = any(name.startswith(a) and not name.startswith(f"{a}base_layer") for a in adapters)
        for parameter, weight in module._parameters.items() if not beside else ():
            if weight is None or not (weight.ndim == 3 or (parameter == "weight" and _is_linear(module))):
                continue
            if isinstance(module, nn.modules.conv._ConvNd):
                continue
            known = f"{name}.{parameter}".removesuffix(".weight")
            transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
            maps[known] = Target(f"{name}.{parameter}", module, weight, 0, parameter, transposed)
    return maps


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and _weight(module).ndim == 2


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _layer_number(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(
            f"{name!r} has no layer number in its name; expected a module inside the model's layers, "
            "such as 'model.layers.0.mlp.up_proj'"
        )
    return numbers[0]


def _mlp_maps(model: Any, maps: dict[str, Target]) -> dict[str, Target]:
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    layers = _layers(model, maps)
    for outside_mixers in (True, False):  # the mixers learn where nothing else can
        chosen: dict[str, Target] = {}
        for prefix, (attentions, mixers) in layers.items():
            left_out = (*attentions, *mixers) if outside_mixers else attentions
            inside = {n: t for n, t in maps.items() if n.startswith(f"{prefix}.")}
            inside = {n: t for n, t in inside.items() if not n.startswith(left_out)}
            plain = {n: t for n, t in inside.items() if not t.stack}
            stacked = {n: t for n, t in inside.items() if t.stack}
            other_way = {n: replace(t, transposed=not t.transposed) for n, t in stacked.items()}
            if outside_mixers:
                found = _pairs(plain, width) | (_pairs(stacked, width) or _pairs(other_way, width))
            else:
                found = {n: t for n, t in plain.items() if n.startswith(mixers) and width in t.features}
            chosen.update({name: found[name] for name in inside if name in found})
        if chosen:
            return chosen
    what = "has no MLP of linear maps" if layers else "has no layers with attention or recurrence"
    raise ValueError(_no_mlp(f"{type(model).__name__} {what}", maps))


def _pairs(maps: dict[str, Target], width: int | None) -> dict[str, Target]:
    """Maps from the width to an inner one or to twice that, and from there back."""
    downs = {t.features[0] for t in maps.values() if t.features[1] == width}
    ups = {t.features[1] for t in maps.values() if t.features[0] == width}
    inner = {i for i in downs if i in ups or 2 * i in ups}
    wide = inner | {2 * i for i in inner}
    return {
        name: t
        for name, t in maps.items()
        if (t.features[1] == width and t.features[0] in inner)
        or (t.features[0] == width and t.features[1] in wide)
    }


def _layers(model: nn.Module, maps: dict[str, Target]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Name of each layer → beginnings of the names inside its attention modules, and inside its mixers."""
    lists: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for list_name, modules in model.named_modules():
        for index, layer in enumerate(modules) if isinstance(modules, nn.ModuleList) else ():
            prefix = f"{list_name}.{index}"
            # norms are often called after the attention they precede
            attentions = tuple(
                start
                for start in _attentions(prefix, layer)
                if any(known.startswith(start) for known in maps)
            )
            mixers = tuple(
                f"{prefix}.{name}."
                for name, child in layer.named_modules()
                if any(isinstance(part, nn.Conv1d) for part in child.children())
            )
            lists.setdefault(list_name, {})[prefix] = attentions, mixers
    for which in (0, 1):
        found = [layers for layers in lists.values() if any(own[which] for own in layers.values())]
        if found:
            return {prefix: own for layers in found for prefix, own in layers.items()}
    return {}


def _attentions(prefix: str, layer: nn.Module) -> Iterator[str]:
    """Beginnings of the names inside modules that are called after attention, also those of inner layers."""
    for name, child in layer.named_children():
        if type(child).__name__.endswith("Layer") and list(child.named_children()):
            yield from _attentions(f"{prefix}.{name}", child)
        elif "attn" in name.lower() or "attention" in f"{name}{type(child).__name__}".lower():
            yield f"{prefix}.{name}."


def _matching(maps: dict[str, Target], endings: Sequence[str]) -> list[str]:
    if isinstance(endings, str) or not endings:
        raise ValueError(f"modules must be a list of names, got {endings!r}")
    found: set[str] = set()
    for ending in endings:
        fits = {name for name in maps if name == ending or name.endswith(f".{ending}")}
        if not fits:
            raise unknown("linear module", ending, _patterns(maps))
        found |= fits
    return [name for name in maps if name in found]


def _patterns(maps: dict[str, Target]) -> list[str]:
    """Names with the layer's number left out, each once: `mlp.up_proj` for all layers."""
    patterns = []
    for name in maps:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        patterns.append(".".join(parts[last + 1 :]))
    return sorted(set(patterns))


def _no_mlp(what: str, maps: dict[str, Target]) -> str:
    candidates = ", ".join(_patterns(maps)) or "none"
    return f"{what}. Name the modules to learn: modules=[…]. Linear modules of the model: {candidates}."


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model in torch.compile's or peft's wrapper; an adapter stays in force."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"{type(model).__name__} has prompts of {config.peft_type.value} before every text, "
                "which are no part of a context that goes on; give its base model (get_base_model()), or an "
                "adapter of weights such as LoRA"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            f"expected a transformers causal language model, got {type(model).__name__}; "
            "load one with AutoModelForCausalLM.from_pretrained"
        )
    return model


def check_weights(targets: Sequence[Target]) -> None:
    """Raise ValueError where a delta cannot be put on a weight."""
    for target in targets:
        if target.weight.device.type == "meta":
            raise ValueError(f"{target.name} is on the meta device: load the model's weights first")
        if target.stack and is_quantised(target.weight):
            raise ValueError(
                f"{target.name} is a quantised stack of experts ({target.weight.dtype}), to which no delta "
                "can be added; load the model without quantising its experts, or name other modules=[…]"
            )


def check_gradients(model: nn.Module) -> None:
    """Raise ValueError where no gradient can be taken through a model."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made inside torch.inference_mode(), so that no gradient can be taken through "
                "it; load the model outside of that mode"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _cuts_gradients(module):
            raise ValueError(
                f"{name} rounds its inputs ({type(module.weight.data).__name__}), so that no gradient passes "
                "it, and what lies below would not learn; quantise the weights alone (torchao's "
                "Int8WeightOnlyConfig), or learn before quantising"
            )


def _cuts_gradients(module: nn.Linear) -> bool:
    """Whether a linear map of torchao gives an output that its input has no gradient of; found by a call."""
    weight = module.weight
    if not is_traceable_wrapper_subclass(weight) or isinstance(weight, DTensor):
        return False
    with torch.enable_grad():
        row = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        return not module(row).requires_grad


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight has no numbers that a delta could be added to: integers, or a subclass of tensors
    that holds integers and scales (torchao's)."""
    wraps = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return wraps or not weight.is_floating_point()


def memory_dtype(weight: Tensor) -> torch.dtype:
    """Precision of deltas and sums of gradients: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
