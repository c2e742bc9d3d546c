"""Deltas as LoRA factors, and the folder that peft loads them from; peft itself is not needed to write it.

An adapter adds B A x to what a linear map gives: A [r, in], B [out, r], with lora_alpha = r, so that peft
scales by 1. Deltas that are products already are put side by side where their ranks add up to r or less;
otherwise the r largest singular values of the sum are kept, which is the nearest matrix of that rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from nested_learning._files import write_text
from nested_learning._progress import progress
from nested_learning.continual.deltas import UP, Row
from nested_learning.continual.find import Target, memory_dtype
from nested_learning.continual.weights import acting
from nested_learning.continual.writing import DeltaWriter
from nested_learning.ops.context import full_precision

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Factors:
    """Factors of one weight's delta at a given rank r.

    Attributes:
        down: A, [r, in], float32 (float64 under a float64 weight).
        up: B, [out, r].
        norm: Frobenius norm of the delta Δ.
        lost: ‖Δ − BA‖.
    """

    down: Tensor
    up: Tensor
    norm: float
    lost: float


def lora_factors(writers: Sequence[DeltaWriter], row: Row, rank: int) -> dict[Target, Factors]:
    """Factors of the sum of a row's deltas, for every weight that a level may learn; zero where none did."""
    targets = dict.fromkeys(target for writer in writers for target in writer.targets)
    found = {}
    with progress("taking the largest singular values", len(targets), "matrix") as bar:
        for target in targets:
            with full_precision(target.weight.device):
                found[target] = _factors(writers, row, target, rank)
            bar.advance()
    return found


def _factors(writers: Sequence[DeltaWriter], row: Row, target: Target, rank: int) -> Factors:
    inputs, outputs = target.features
    like: dict[str, Any] = {"dtype": memory_dtype(target.weight), "device": target.weight.device}
    downs, ups = [torch.zeros(0, inputs, **like)], [torch.zeros(outputs, 0, **like)]
    full = None
    for writer, state, acting_on in acting(writers, row):
        if acting_on is not target:
            continue
        if target.name + UP in state.deltas:
            down, up = writer.factors(state, target)
            downs.append(down)
            ups.append(up)
        elif (delta := writer.full_delta(state, target)) is not None:
            delta = delta.T if target.transposed else delta
            full = delta if full is None else full + delta
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    if full is not None:
        left, values, right = torch.linalg.svd(full + up @ down, full_matrices=False)
    elif len(down) <= rank:
        missing = rank - len(down)
        norm = float((up @ down).double().norm()) if len(down) else 0.0
        return Factors(pad(down, (0, 0, 0, missing)), pad(up, (0, missing)), norm, 0.0)
    else:  # up · down = Q_u (R_u R_dᵀ) Q_dᵀ: the singular values are those of a small matrix
        outer, inner = torch.linalg.qr(up), torch.linalg.qr(down.T)
        left, values, right = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
        left, right = outer.Q @ left, right @ inner.Q.T
    return _largest(left, values, right, rank)


def _largest(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Factors:
    """The `rank` largest singular values, their roots on both sides, filled up with zeros."""
    roots, missing = values[:rank].sqrt(), max(0, rank - len(values))
    return Factors(
        pad(roots[:, None] * right[:rank], (0, 0, 0, missing)),
        pad(left[:, :rank] * roots, (0, missing)),
        float(values.double().norm()),
        float(values[rank:].double().norm()),
    )


@contextmanager
def computing_with(factors: Mapping[Target, Factors]) -> Iterator[None]:
    """The model computes inside the scope as peft computes with these factors."""
    handles = [
        target.module.register_forward_hook(partial(_add, each.down, each.up))
        for target, each in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(down: Tensor, up: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Forward hook: y + B A x, in the precision of the factors, rounded to that of y."""
    return (y + linear(linear(inputs[0].to(down.dtype), down), up)).to(y.dtype)


def write_adapter(folder: Path, model: Any, factors: Mapping[Target, Factors], rank: int) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: a folder that is there.
        model: the base model.
        factors: factors of each weight, of this rank.
        rank: r.
    """
    names = [target.name.removesuffix(".weight") for target in factors]
    tensors = {}
    for name, each in zip(names, factors.values(), strict=True):
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = each.down.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = each.up.contiguous()
    config = {
        "base_model_name_or_path": model.name_or_path or None,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in factors),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _endings(model, names),
        "task_type": "CAUSAL_LM",
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _endings(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last parts of the modules' names where they mean these modules alone, else the whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings) if meant == set(names) else list(names)
