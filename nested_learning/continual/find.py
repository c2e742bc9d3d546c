"""The weights of a pretrained model that learn: the MLP matrices, found by structure, or modules by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nested_learning._errors import unknown


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that levels may put a delta on.

    Args:
        name: name of the weight in the model's state_dict.
        module: module that has the weight, an nn.Linear or GPT-2's Conv1D.
        weight: the pretrained parameter, [out, in], or [in, out] in a Conv1D.
        layer: index of the layer it belongs to.
    """

    name: str
    module: nn.Module
    weight: Tensor
    layer: int

    @property
    def transposed(self) -> bool:
        """Whether the weight is [in, out]."""
        return isinstance(self.module, Conv1D)

    @property
    def features(self) -> tuple[int, int]:
        """(in, out) of the map."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.transposed else (columns, rows)


def find_targets(model: Any, modules: Sequence[str] | None = None) -> list[Target]:
    """The weights to learn, in the order of the model.

    By structure: the model's layers are those members of a ModuleList that have an attention module; of
    each layer the linear maps outside of it that lead from the hidden width to another, and from there
    back, are its MLP. That is the case in Llama, Qwen2, Qwen3, Mistral, GPT-2, GPT-NeoX, OPT and their
    relatives.

    Args:
        model: a transformers causal language model.
        modules: names of linear modules instead, or the ends of names: `["mlp.up_proj"]` takes that module
            of every layer. A module's layer is the first number in its name.

    Raises:
        ValueError: no MLP is found, or a name fits no linear module; the message lists the candidates.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if modules is None:
        chosen = _mlp_modules(model, linear)
    else:
        chosen = {name: linear[name] for name in _matching(linear, modules)}
    numbered = [(_layer_number(name), name, module) for name, module in chosen.items()]
    layers = sorted({number for number, _, _ in numbered})
    return [
        Target(f"{name}.weight", module, _weight(module), layers.index(number))
        for number, name, module in numbered
    ]


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


def _mlp_modules(model: nn.Module, linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    width = getattr(model.config, "hidden_size", None)
    chosen: dict[str, nn.Module] = {}
    layers = _attention_layers(model)
    for prefix, attentions in layers.items():
        inside = {
            name: Target(name, module, _weight(module), 0).features
            for name, module in linear.items()
            if name.startswith(f"{prefix}.") and not name.startswith(attentions)
        }
        inner = {i for i, o in inside.values() if o == width} & {o for i, o in inside.values() if i == width}
        pair = [
            n for n, (i, o) in inside.items() if (o == width and i in inner) or (i == width and o in inner)
        ]
        if not pair:
            raise ValueError(_no_mlp(f"layer {prefix!r} has no MLP of linear maps", linear))
        chosen.update({name: linear[name] for name in pair})
    if not chosen:
        raise ValueError(_no_mlp(f"{type(model).__name__} has no layers with attention", linear))
    return chosen


def _attention_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of each layer → beginnings of the names inside its attention modules."""
    layers: dict[str, tuple[str, ...]] = {}
    for list_name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList):
            continue
        for index, layer in enumerate(modules):
            prefix = f"{list_name}.{index}"
            attentions = tuple(
                f"{prefix}.{name}."
                for name, child in layer.named_children()
                if "attn" in name.lower() or "attention" in f"{name}{type(child).__name__}".lower()
            )
            # norms are often called after the attention they precede
            if any(
                any(name.startswith(a) for a in attentions)
                for name, m in model.named_modules()
                if _is_linear(m)
            ):
                layers[prefix] = attentions
    return layers


def _matching(linear: dict[str, nn.Module], endings: Sequence[str]) -> list[str]:
    if isinstance(endings, str) or not endings:
        raise ValueError(f"modules must be a list of names, got {endings!r}")
    found: set[str] = set()
    for ending in endings:
        fits = {name for name in linear if name == ending or name.endswith(f".{ending}")}
        if not fits:
            raise unknown("linear module", ending, _patterns(linear))
        found |= fits
    return [name for name in linear if name in found]


def _patterns(linear: dict[str, nn.Module]) -> list[str]:
    """Names with the layer's number left out, each once: `mlp.up_proj` for all layers."""
    patterns = []
    for name in linear:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        patterns.append(".".join(parts[last + 1 :]))
    return sorted(set(patterns))


def _no_mlp(what: str, linear: dict[str, nn.Module]) -> str:
    candidates = ", ".join(_patterns(linear)) or "none"
    return f"{what}. Name the modules to learn: modules=[…]. Linear modules of the model: {candidates}."


def check_weights(targets: Sequence[Target], full: set[str]) -> None:
    """Raise ValueError where a full-matrix delta (names in `full`) cannot be added to a weight."""
    for target in targets:
        weight = target.weight
        if weight.device.type == "meta":
            raise ValueError(f"{target.name} is on the meta device: load the model's weights first")
        if target.name in full and not weight.is_floating_point():
            raise ValueError(
                f"{target.name} is quantised ({weight.dtype}); a full matrix cannot be added to it. "
                "Give the level a `rank`, or load the model in bfloat16."
            )


def memory_dtype(weight: Tensor) -> torch.dtype:
    """Precision of deltas and sums of gradients: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
