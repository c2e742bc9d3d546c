"""Memory files: written, read, locked against other processes; the fingerprint of their base model."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from nested_learning._files import writable
from nested_learning._tensor_files import check_whole, parse_json, read_tensors, write_tensors
from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.find import is_quantised
from nested_learning.continual.level import without_layers
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.replaying.saved_store import store_fields, store_tensors
from nested_learning.continual.saved_rows import RESUME, SavedRows
from nested_learning.continual.writing import DeltaWriter

FORMAT, PRECISION = "nested_learning.continual_memory", "precision"
VERSION, WITHOUT_CHECKSUM = "2", "1"
OPTIONAL = ("background", "fisher", "starts")  # parts of an identity that most learners do not have
SAMPLES = 4096  # elements of each parameter that the fingerprint looks at


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) of the model's type and of its parameters: names, shapes, and 4,096 evenly spaced
    elements each, rounded to bfloat16, so that a model has one fingerprint in float32 and in bfloat16."""
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for plain in _plain(parameter.detach()):
            flat = plain.reshape(-1)
            step = max(1, len(flat) // SAMPLES)
            sample = flat[::step]
            if sample.is_floating_point():
                sample = sample.to(torch.bfloat16).view(torch.int16)
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one is made of, such as integers and scales; else the tensor itself."""
    if not (is_quantised(tensor) and is_traceable_wrapper_subclass(tensor)):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    return [plain for part in parts if part is not None for plain in _plain(part)]


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else, in this process or another, has the memory file in use inside the scope.

    The lock is the operating system's, on `PATH.lock` beside the file that the path stands for: it ends with
    the process, even one that is killed.

    Raises:
        ValueError: the file is in use, or it is a folder, a device or a pipe.
        OSError: its folder is missing, or it is write-protected.
    """
    lock = FileLock(f"{writable(path)}.lock")
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


def to_json(value: Any) -> str:
    """Canonical JSON: equal texts for equal values."""
    return json.dumps(value, sort_keys=True)


def check_file_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a precision that memory files cannot have."""
    if dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"a memory file is exact (None) or in torch.bfloat16, got {dtype!r}; float16 has not the "
            "range of gradients and of the rules' states"
        )


def write_memory(
    path: Path, rows: Sequence[Row], identity: dict[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write rows to a file; `identity` is what a learner must agree with to read it again.

    `dtype` is that of all floating-point tensors in the file but those of a store; None for their own.
    """
    check_file_dtype(dtype)
    tensors: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        for name, t in _row_tensors(row).items():
            rounded = dtype is not None and t.is_floating_point() and not name.startswith("store/")
            tensors[f"{index}/{name}"] = t.to(dtype) if rounded else t
    numbers = to_json([_row_numbers(row) for row in rows])
    rounded_to = {} if dtype is None else {PRECISION: str(dtype)}
    about = {"format": FORMAT, "version": VERSION, "rows": numbers, **rounded_to, **identity}
    write_tensors(path, tensors, about)


def read_memory(
    path: Path,
    writers: Sequence[DeltaWriter],
    model: PreTrainedModel,
    plan: ReadingPlan,
    identity: dict[str, str],
) -> list[Row]:
    """The rows of a file that a learner of this identity wrote, on the model's device.

    Warns:
        RuntimeWarning: the file is of a version without checksums.

    Raises:
        FileNotFoundError, ValueError: see `Memory.load`.
    """
    tensors, metadata = read_tensors(path, "memory")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not the memory of a learner")
    version = metadata.get("version")
    if version not in (VERSION, WITHOUT_CHECKSUM):
        raise ValueError(
            f"{path} has memory format version {version!r}, this package reads "
            f"{WITHOUT_CHECKSUM!r} and {VERSION!r}"
        )
    try:
        if version == VERSION:
            check_whole(tensors, metadata)
        # "gd" has also been called "sgd". In this JSON of settings no other text can look like the pair.
        if "levels" in metadata:
            metadata["levels"] = metadata["levels"].replace('"rule": "sgd"', '"rule": "gd"')
        key = first_difference(metadata, identity)
        if key is not None:
            raise _Mismatch(_mismatch(path, key, metadata.get(key), identity.get(key)))
        rows = SavedRows(tensors, writers, model, plan).read(parse_json(metadata["rows"]))
    except _Mismatch:
        raise
    except (KeyError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {what}") from error
    if version == WITHOUT_CHECKSUM:
        warnings.warn(
            f"{path} is of a version without checksums: whether its numbers are those that were written "
            "cannot be told; saved again, it gets one",
            RuntimeWarning,
            stacklevel=4,
        )
    return rows


def first_difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """The first part of our identity that is another in theirs; None where all are the same."""
    for key in {**ours, **dict.fromkeys(OPTIONAL)}:
        if theirs.get(key) != ours.get(key) and not (key == "levels" and _same_levels(theirs, ours)):
            return key
    return None


def _same_levels(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether the settings of levels are equal by value: 1 is 1.0, and layers are those of equal weights."""
    one, other = (parse_json(each.get("levels", "null")) for each in (theirs, ours))
    if theirs.get("weights") == ours.get("weights"):
        one, other = without_layers(one), without_layers(other)
    return bool(one == other)


class _Mismatch(ValueError):
    """A whole file, but another learner's."""


def _row_tensors(row: Row) -> dict[str, Tensor]:
    """Tensors of a row by their names in the file, where `learn` goes by the name of "mask"."""
    tensors = {"tokens": row.tokens, "mask": row.learn}
    for prefix, context in (("", row.context), (RESUME, row.resume or Context())):
        for i, layer in enumerate(context.layers):
            tensors.update({f"{prefix}{name}/{i}": t for name, t in layer.items()})
    if row.answers is not None:
        tensors.update({f"answers/{name}": t for name, t in vars(row.answers).items()})
    for index, state in enumerate(row.levels):
        tensors.update({f"{index}/delta/{slot}": t for slot, t in state.deltas.items()})
        tensors.update({f"{index}/sum/{slot}": t for slot, t in state.sums.items()})
        tensors.update({f"{index}/units/{layer}": t for layer, t in state.units.items()})
        tensors.update({f"{index}/background/{layer}": t for layer, t in state.background.items()})
        if state.chunks:
            tensors[f"{index}/chunks"] = torch.tensor(state.chunks, device="cpu")
        for slot, t in state.drawn.items():
            if not any(t is faster.drawn.get(slot) for faster in row.levels[:index]):  # an average shares it
                tensors[f"{index}/drawn/{slot}"] = t
        tensors.update({f"{index}/distilled/{slot}": t for slot, t in state.distilled.items()})
        if state.read is not None:
            tensors[f"{index}/read"], tensors[f"{index}/read_mask"] = state.read.tokens, state.read.learn
        for slot, stored in state.rule.items():
            tensors.update({f"{index}/rule/{field}/{slot}": t for field, t in stored.items()})
    return tensors if row.store is None else {**tensors, **store_tensors(row.store)}


def _row_numbers(row: Row) -> dict[str, Any]:
    """Everything of a row that is no tensor, as JSON values; `read`, the lengths of its contexts, only where
    they have states, whose shapes do not say it."""
    kept = {} if row.store is None else {"store": store_fields(row.store)}
    lengths = {} if row.context.is_croppable else {"read": [len(row.context), row.resume and len(row.resume)]}
    return {
        **kept,
        **lengths,
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


def _mismatch(path: Path, key: str, theirs: str | None, ours: str | None) -> str:
    if key in OPTIONAL:
        one, other = (f"the {key} {digest[:12]}…" if digest else f"no {key}" for digest in (theirs, ours))
        hint = "; give the file of the right ones: starts=…, or --starts FILE" if key == "starts" else ""
        return f"{path} was written by a learner with {one}; this learner has {other}{hint}"
    if key == "fingerprint":
        return (
            f"{path} belongs to another base model (fingerprint {str(theirs)[:12]}…, this one has "
            f"{str(ours)[:12]}…): load it on the model that it was learned on"
        )
    return f"{path} was written by a learner with other {key}: {theirs}; this learner has {ours}"
