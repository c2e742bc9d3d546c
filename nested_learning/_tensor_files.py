"""Safetensors files with a checksum over everything that they say.

The metadata of a file has "sha256", and in "checked" the names of the metadata that it covers, "checked"
itself among them; what others add later is none of its business.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nested_learning._files import replacing

CHECKSUM, CHECKED = "sha256", "checked"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file and its checksum.

    Raises:
        ValueError: the path is that of a folder, a device or a pipe.
        OSError: it cannot be written; a file of that name is left as it was.
    """
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    metadata = {**metadata, CHECKED: json.dumps(sorted([*metadata, CHECKED]))}
    metadata[CHECKSUM] = checksum(tensors, metadata, json.loads(metadata[CHECKED]))
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {os.fspath(path)}: {error}") from error


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a safetensors file.

    Args:
        path: path of the file.
        kind: name of what it holds, for messages: "memory", "cache".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file at {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, not views of the mapped file: a later write to it must not reach a running model.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, AttributeError, TypeError, RuntimeError) as error:
        # the last three: dtypes that torch does not have, shapes beyond its integers
        raise ValueError(
            f"{os.fspath(path)} is truncated, damaged or no safetensors file: {error}"
        ) from error


def check_whole(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checked: Sequence[str] | None = None
) -> None:
    """Raise unless the content is what was written.

    Args:
        tensors: tensors of the file.
        metadata: metadata of the file.
        checked: names of the metadata that the checksum covers; None: those that the file itself lists.

    Raises:
        ValueError: it is not, or there is no checksum.
    """
    for name in (CHECKSUM,) if checked else (CHECKSUM, CHECKED):
        if name not in metadata:
            raise ValueError(f"its {name} is missing")
    names = listed(metadata[CHECKED]) if checked is None else checked
    lacking = sorted(set(names) - set(metadata))
    if lacking:
        raise ValueError(f"its {', '.join(lacking)} is missing")
    if metadata[CHECKSUM] != checksum(tensors, metadata, names):
        raise ValueError("its content does not have the checksum that was saved with it")


def listed(text: str) -> list[str]:
    """A list of texts in JSON. ValueError for anything else."""
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a list of names, got {text[:60]!r}")
    return names


def parse_json(text: str) -> object:
    """The value of a JSON text. ValueError where there is none, or one that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Sequence[str]) -> str:
    """sha256 (hex) over the tensors, contiguous, with their names, shapes and dtypes, and some metadata."""
    digest = hashlib.sha256()
    described = [(name, str(t.dtype), list(t.shape)) for name, t in sorted(tensors.items())]
    digest.update(json.dumps([described, [metadata[name] for name in names]]).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
