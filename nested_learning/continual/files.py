"""Memory files: written, read, locked against other processes; the fingerprint of their base model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from nested_learning._files import write_tensors
from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.find import memory_dtype
from nested_learning.continual.writing import DeltaWriter

FORMAT = "nested_learning.continual_memory"
VERSION = "1"
SAMPLES = 4096  # elements of each parameter that the fingerprint looks at


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of the model's type and of its parameters: names, shapes, and 4,096 evenly spaced
    elements each, rounded to bfloat16, so that a model has one fingerprint in float32 and in bfloat16."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, len(flat) // SAMPLES)
        sample = flat[::step]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else, in this process or another, has the memory file in use inside the scope.

    The lock is the operating system's, on `PATH.lock`: it ends with the process, even one that is killed.

    Raises:
        ValueError: the file is in use.
    """
    lock = FileLock(f"{os.fspath(path)}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"the memory file {os.fspath(path)} is in use by another process; end that one, "
            "or give this one a memory file of its own"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_tensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the device, metadata).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Copies, not views of the mapped file: deltas are written in place, files only as a whole.
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {error}") from error


def to_json(value: Any) -> str:
    """Canonical JSON: equal texts for equal values."""
    return json.dumps(value, sort_keys=True)


def write_memory(path: Path, rows: Sequence[Row], identity: dict[str, str]) -> None:
    """Write rows to a file; `identity` is what a learner must agree with to read it again."""
    tensors: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        tensors.update({f"{index}/{name}": t for name, t in _row_tensors(row).items()})
    numbers = to_json([_row_numbers(row) for row in rows])
    write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, "rows": numbers, **identity})


def read_memory(
    path: Path, writers: Sequence[DeltaWriter], model: PreTrainedModel, identity: dict[str, str]
) -> list[Row]:
    """The rows of a file that a learner of this identity wrote, on the model's device.

    Raises:
        FileNotFoundError, ValueError: see `Memory.load`.
    """
    tensors, metadata = read_tensors(path, model.device)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not the memory of a learner")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has memory format version {metadata.get('version')!r}, this package reads {VERSION!r}"
        )
    # "gd" has also been called "sgd". In this JSON of settings no other text can look like the pair.
    if "levels" in metadata:
        metadata["levels"] = metadata["levels"].replace('"rule": "sgd"', '"rule": "gd"')
    for key, value in identity.items():
        if metadata.get(key) != value:
            raise ValueError(_mismatch(path, key, metadata.get(key), value))
    try:
        return [
            _read_row(f"{index}/", numbers, tensors, writers, model)
            for index, numbers in enumerate(json.loads(metadata["rows"]))
        ]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _row_tensors(row: Row) -> dict[str, Tensor]:
    """Tensors of a row by their names in the file, where `learn` goes by the name of "mask"."""
    tensors = {"tokens": row.tokens, "mask": row.learn}
    for i, (keys, values) in enumerate(row.context.layers):
        tensors[f"keys/{i}"], tensors[f"values/{i}"] = keys, values
    for index, state in enumerate(row.levels):
        tensors.update({f"{index}/delta/{slot}": t for slot, t in state.deltas.items()})
        tensors.update({f"{index}/sum/{slot}": t for slot, t in state.sums.items()})
        for slot, stored in state.rule.items():
            tensors.update({f"{index}/rule/{field}/{slot}": t for field, t in stored.items()})
    return tensors


def _row_numbers(row: Row) -> dict[str, Any]:
    """Everything of a row that is no tensor, as JSON values."""
    return {
        "position": row.position,
        "start": row.start,
        "context_layers": len(row.context.layers),
        "levels": [
            {
                "loss": repr(state.loss),  # JSON has no NaN
                "pairs": state.pairs,
                "history": state.history,
                "rule": sorted({field for stored in state.rule.values() for field in stored}),
            }
            for state in row.levels
        ],
    }


def _read_row(
    prefix: str,
    numbers: dict[str, Any],
    tensors: dict[str, Tensor],
    writers: Sequence[DeltaWriter],
    model: PreTrainedModel,
) -> Row:
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    row = Row.new(len(writers), model.device)
    row.position, row.start, row.tokens = numbers["position"], numbers["start"], own["tokens"]
    learn = own.get("mask")  # a file without one is of a time when everything was learned
    row.learn = torch.ones(len(row.tokens), dtype=torch.bool) if learn is None else learn.cpu()
    layers = range(numbers["context_layers"])
    row.context = Context(tuple((own[f"keys/{i}"], own[f"values/{i}"]) for i in layers)).to(model.dtype)
    for writer, state, saved in zip(writers, row.levels, numbers["levels"], strict=True):
        state.loss, state.pairs = float(saved["loss"]), saved["pairs"]
        state.history = list(saved["history"])
        # The model may have another precision than the one that the file was written with.
        dtype = memory_dtype(writer.targets[0].weight)
        for kind, slots in (("delta", state.deltas), ("sum", state.sums)):
            for slot in writer.keys:
                if (stored := own.get(f"{writer.index}/{kind}/{slot}")) is not None:
                    if tuple(stored.shape) != writer.shape(slot):
                        raise ValueError(
                            f"{slot} has shape {tuple(stored.shape)}, expected {writer.shape(slot)}"
                        )
                    slots[slot] = stored.to(dtype)
        for field in saved["rule"]:
            for slot in writer.keys:
                if (stored := own.get(f"{writer.index}/rule/{field}/{slot}")) is not None:
                    stored = stored.to(dtype) if stored.is_floating_point() else stored
                    state.rule.setdefault(slot, {})[field] = stored
    return row


def _mismatch(path: Path, key: str, theirs: str | None, ours: str) -> str:
    if key == "fingerprint":
        return (
            f"{path} belongs to another base model (fingerprint {str(theirs)[:12]}…, this one has "
            f"{ours[:12]}…): load it on the model that it was learned on"
        )
    return f"{path} was written by a learner with other {key}: {theirs}; this learner has {ours}"
