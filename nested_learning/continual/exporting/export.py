"""A way out: what was learned as a plain checkpoint of transformers, or as a LoRA adapter for peft."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning._checks import require_folder_name
from nested_learning._files import whole_folder
from nested_learning._progress import progress
from nested_learning.continual.context import evaluating
from nested_learning.continual.deltas import Row
from nested_learning.continual.exporting.adapter_folder import (
    Factors,
    computing_with,
    lora_factors,
    write_adapter,
)
from nested_learning.continual.find import Target, is_quantised
from nested_learning.continual.inputs import TextOrIds, fitting, read_batch, vocabulary_size
from nested_learning.continual.reader import Reader
from nested_learning.continual.weights import acting
from nested_learning.continual.writing import DeltaWriter
from nested_learning.optimizers.checks import COUNT

PROBE_TOKENS = 256


@dataclass(frozen=True)
class Exported:
    """Report of an export.

    Attributes:
        folder: the folder that was written.
        kind: "checkpoint" or "adapter".
        weights: names of the weights that differ from the base model's.
        difference: largest absolute difference between the logits of the export and those of the learner
            on the probe. Above zero where what was learned at a rank, or in float32, was rounded to the
            base's precision, or where an adapter's rank has cut it.
        largest_logit: largest absolute logit of the learner on the probe.
        truncation: of an adapter, ‖Δ − BA‖ / ‖Δ‖ (Frobenius) of each weight; empty for a checkpoint.
        truncated: the same ratio over all weights together; 0 for a checkpoint.
    """

    folder: Path
    kind: str
    weights: tuple[str, ...]
    difference: float
    largest_logit: float
    truncation: Mapping[str, float]
    truncated: float


@torch.no_grad()
def export(
    reader: Reader,
    tokenizer: Any,
    row: Row,
    folder: str | os.PathLike[str],
    lora_rank: int | None,
    probe: TextOrIds | None,
) -> Exported:
    """Write what a row of a reader has learned; see `Learner.export`."""
    model = reader.model
    path = unused(folder)
    check_rank(lora_rank)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"the base model has an adapter of peft (on {name}), which neither a checkpoint nor a LoRA "
                "adapter could carry along: merge it first (merge_and_unload), and let a learner "
                "on the merged model read"
            )
    if lora_rank is None:
        _check_mergeable(model, reader.writers)
    elif stacked := [target.name for writer in reader.writers for target in writer.targets if target.stack]:
        raise ValueError(
            f"{stacked[0]} is a stack of experts, which no LoRA adapter of peft fits: export a checkpoint "
            "instead (without lora_rank)"
        )
    ids = _probe(probe, tokenizer, model, row)
    with reader.workspace.installed(reader.writers, row):
        wanted = _logits(model, ids)
    factors: dict[Target, Factors] = {}
    with reader.workspace.bare(), whole_folder(path) as temporary:
        if lora_rank is None:
            changed = merged(reader.writers, row)
            found = _write_checkpoint(temporary, model, tokenizer, changed, ids)
        else:
            factors = lora_factors(reader.writers, row, lora_rank)
            changed = {target.name: each.up for target, each in factors.items() if each.norm}
            write_adapter(temporary, model, factors, lora_rank)
            with computing_with(factors):
                found = _logits(model, ids)
    return Exported(
        folder=path,
        kind="checkpoint" if lora_rank is None else "adapter",
        weights=tuple(changed),
        difference=float((found - wanted).abs().max()),
        largest_logit=float(wanted.abs().max()),
        truncation={target.name: each.lost / each.norm for target, each in factors.items() if each.norm},
        truncated=_overall(list(factors.values())),
    )


def _overall(factors: Sequence[Factors]) -> float:
    norm = sum(each.norm**2 for each in factors) ** 0.5
    return sum(each.lost**2 for each in factors) ** 0.5 / norm if norm else 0.0


def unused(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder that is not there, or is empty. ValueError for any other."""
    require_folder_name("output", os.fspath(folder))
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"the folder {path} is not empty; name another one, or remove it first")
    return path


def check_rank(lora_rank: int | None) -> None:
    """Raise ValueError for a rank that no adapter can have."""
    if lora_rank is not None:
        COUNT.check("lora_rank", lora_rank)


def _check_mergeable(model: Any, writers: Sequence[DeltaWriter]) -> None:
    """Raise ValueError where a delta cannot be added to the weights of a quantised model."""
    weights = {target.name: target.weight for writer in writers for target in writer.targets}
    packed = [name for name, weight in weights.items() if is_quantised(weight)]
    if packed or getattr(model, "hf_quantizer", None) is not None:
        which = f"{packed[0]} is quantised" if packed else "the base model is quantised"
        raise ValueError(
            f"{which}: what was learned cannot be merged into its weights. Export a LoRA adapter instead "
            "(lora_rank=…), or load the base model in bfloat16, and the memory on that one."
        )


def merged(writers: Sequence[DeltaWriter], row: Row) -> dict[str, Tensor]:
    """W_base + Σ Δ in the precision of W_base, by name, of each weight that has a delta other than zero.

    Summed in the order in which the learner sums, and rounded once, so that full deltas give its very
    weights.
    """
    totals: dict[Target, Tensor] = {}
    by_rank = sorted(acting(writers, row), key=lambda each: each[0].level.rank is not None)
    for writer, state, target in by_rank:
        delta = writer.full_delta(state, target)
        if delta is not None and delta.any():
            totals[target] = totals[target] + delta if target in totals else delta
    return {t.name: torch.add(total, t.weight).to(t.weight.dtype) for t, total in totals.items()}


def _write_checkpoint(
    folder: Path, model: Any, tokenizer: Any, changed: Mapping[str, Tensor], ids: Tensor
) -> Tensor:
    """Write a folder as save_pretrained does; logits of the probe by the model that is loaded from it."""
    weights = model.state_dict()
    unknown = changed.keys() - weights.keys()
    if unknown:
        raise ValueError(f"{type(model).__name__} has no weights of the names {', '.join(sorted(unknown))}")

    def save_and_load() -> Any:
        model.save_pretrained(folder, state_dict={**weights, **changed})
        return type(model).from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            local_files_only=True,
        )

    with progress("writing the checkpoint"):
        loaded = save_and_load()
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    return _logits(loaded.to(model.device), ids)


def _probe(given: TextOrIds | None, tokenizer: Any, model: Any, row: Row) -> Tensor:
    """Ids [1, T] to compare logits on."""
    if given is None:
        if len(row.tokens):
            return row.tokens[None, -PROBE_TOKENS:]
        vocab_size = vocabulary_size(model)
        return torch.arange(0, vocab_size, max(1, vocab_size // 32), device=model.device)[None, :32]
    batch = read_batch(given, tokenizer, model)
    if len(batch.rows) != 1:
        raise ValueError(f"the probe must be one text, got {len(batch.rows)}")
    return batch.rows[0][None]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with evaluating(model), fitting(model, "the probe", ids.shape[1]):
        logits: Tensor = model(input_ids=ids).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
