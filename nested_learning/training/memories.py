"""Memories in the course of a training run: what a fixed text leaves in them, at each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nested_learning._files import replacing, write_text
from nested_learning._tensor_files import parse_json
from nested_learning.continual.context import evaluating
from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.memory.watch import MemoryTrace, cuts, watching
from nested_learning.models.hope import HopeCache, HopeConfig
from nested_learning.training.compiling import plain_blocks
from nested_learning.training.process import shards_asked_for
from nested_learning.training.run_folder import RunFolder

PROBES = 48  # keys that are asked for again
Record = dict[str, Any]


def text_of(validation: Dataset, count: int) -> Tensor:
    """The first `count` tokens [count] of the validation samples, one after the other.

    Raises:
        ValueError: there are not as many.
    """
    pieces: list[Tensor] = []
    have = 0
    for index in range(len(validation)):  # type: ignore[arg-type]
        pieces.append(validation[index]["input_ids"])
        have += len(pieces[-1])
        if have >= count:
            return torch.cat(pieces)[:count]
    raise ValueError(
        f"memory_tokens is {count}, but the validation text has {have} tokens; expected at most as many. "
        "Set --memory_tokens accordingly, or raise --data.max_validation_blocks."
    )


def check_memories(model: PreTrainedModel) -> None:
    """ValueError for a model without memories to look at, or one that will lie in shards."""
    blocks: Any = model.base_model.layers
    if not any(
        getattr(block.mixer, "has_surprise", False)
        and any(isinstance(module, MemoryLayer) for module in block.modules())
        for block in blocks
    ):
        raise ValueError(
            "memory_tokens looks at memory layers, but no block has one (mixers: "
            f"{', '.join(sorted(set(model.config.layer_mixers)))}); leave it at 0"
        )
    if shards_asked_for():
        raise ValueError("memory_tokens needs the whole model in a process, FSDP has shards: leave it at 0")


@torch.no_grad()
def look(model: PreTrainedModel, ids: Tensor) -> list[Record]:
    """State of each memory layer after it has read ids [T] from its initial state.

    Returns:
        Per memory layer a dict fit for JSON, None for what is not finite: "name", "kind", "memories" (their
        names, N; the last is read out), "distance" [N][H] ‖W − W_initial‖_F over all matrices of a memory,
        "initial_norm" [N][H], "singular_values" of the memory that is read out, by matrix [H][n]; "eta",
        "alpha", "mu" [H], means over the tokens; "surprise", the mean of ‖M(k) − v̂‖, and "recall", the mean
        of 1 − ‖M(k) − v̂‖² / ‖v̂‖² of 48 keys of the text asked for again at its end.
    """
    count = len(ids)
    probes = torch.linspace(0, count - 1, min(count, PROBES)).round().long()
    blocks: Any = model.base_model.layers
    with evaluating(model), plain_blocks(model), watching(blocks, probes) as watches:
        cache = HopeCache(cast(HopeConfig, model.config))
        for start, stop in pairwise(cuts(count, {watch.layer.system.step for watch in watches})):
            piece = ids[start:stop].to(model.device).unsqueeze(0)
            model(piece, past_key_values=cache, use_cache=True, output_surprise=True)
            for watch in watches:
                watch.end_piece(stop - start, stop == count)
        return [_record_of(watch.trace()) for watch in watches]


def _record_of(trace: MemoryTrace) -> Record:
    rates = {"eta": trace.eta, "alpha": trace.alpha, "mu": trace.mu}
    return {
        "name": trace.name,
        "kind": trace.kind,
        "memories": list(trace.memories),
        "distance": _plain(trace.distance[-1]),
        "initial_norm": _plain(trace.initial_norm),
        "singular_values": {name: _plain(values[-1]) for name, values in trace.singular_values.items()},
        **{name: None if values is None else _plain(values.mean(0)) for name, values in rates.items()},
        "surprise": _plain(trace.surprise.mean()),
        "recall": _plain(trace.recall[-1].mean()),
    }


def _plain(values: Any) -> Any:
    """An array as lists fit for JSON."""
    if np.ndim(values) == 0:
        return float(values) if math.isfinite(float(values)) else None
    return [_plain(each) for each in values]


class RecordMemories(TrainerCallback):
    """Looks at the memories at each evaluation, and writes memories.jsonl, memories.png and scalars.

    A run that is resumed goes on with the lines up to its checkpoint.

    Args:
        model: the model, not wrapped.
        ids: [T], the text.
        folder: folder of the run.
        scalar: takes (name, value, step), such as TensorBoard's `add_scalar`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        folder: RunFolder,
        scalar: Callable[[str, float, int], Any],
    ) -> None:
        self.model, self.ids, self.folder, self.scalar = model, ids, folder, scalar
        self.lines: list[Record] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lines = read_memories(self.folder.memories) if self.folder.memories.exists() else []
        self.lines = [line for line in lines if line["step"] <= state.global_step]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = int(state.global_step)
        layers = look(self.model, self.ids)
        self.lines = [line for line in self.lines if line["step"] < step]
        self.lines.append({"step": step, "tokens": len(self.ids), "layers": layers})
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
        write_text(self.folder.memories, text)
        for layer in layers:
            for name, value in summary(layer).items():
                if value is not None:
                    tag = name.replace(",", "").replace(" ", "_")
                    self.scalar(f"memories/{layer['name']}/{tag}", value, step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.lines:
            plot_memories(self.folder.memories_plot, self.lines)


def read_memories(path: Path) -> list[Record]:
    """The lines of a memories.jsonl, by rising step.

    Raises:
        ValueError: the file is damaged.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = parse_json(text)
            if not isinstance(line, dict) or not isinstance(line["step"], int):
                raise ValueError("it has no step")
            for layer in line["layers"]:
                summary(layer)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged in line {number} ({error}); remove the file to begin a new record"
            ) from None
        lines.append(line)
    return lines


def summary(layer: Record) -> dict[str, float | None]:
    """A memory layer in a few numbers: means over its heads.

    "distance" of the memory that is read out and "distance, generating" of the others, "initial norm" of the
    one that is read out; "singular value", its largest; "eta", "alpha", "mu", "surprise" and "recall". None
    for what there is not, or is not finite.
    """
    distances = [_mean(heads) for heads in layer["distance"]]
    largest = [head[0] for matrix in layer["singular_values"].values() for head in matrix]
    known = [value for value in largest if value is not None]
    return {
        "distance": distances[-1],
        "distance, generating": _mean(distances[:-1]),
        "initial norm": _mean(layer["initial_norm"][-1]),
        "singular value": max(known) if len(known) == len(largest) else None,
        **{name: _mean(layer[name] or []) for name in ("eta", "alpha", "mu")},
        "surprise": layer["surprise"],
        "recall": layer["recall"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None without values, or where one of them is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


PANELS = {
    "distance": "‖W − W₀‖ of the memory that is read out",
    "distance, generating": "‖W − W₀‖, mean of the generating memories",
    "singular value": "largest singular value",
    "eta": "learning rate η",
    "alpha": "retention α",
    "recall": "recall at the end of the text",
}


def plot_memories(path: Path, lines: Sequence[Record]) -> None:
    """Write the course of all memory layers as a PNG, whole or not at all; a panel for each of `PANELS`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"memories after the same {lines[-1]['tokens']:,} tokens, in the course of training")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for place, layer in enumerate(lines[-1]["layers"]):
            points = [(line["step"], summary(line["layers"][place])[name]) for line in lines]
            known = [(step, value) for step, value in points if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=layer["name"])
        axes.set(title=title, xlabel="optimizer step")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=6)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
