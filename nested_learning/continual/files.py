"""Memory files: read, locked against other processes, and the fingerprint of their base model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
    return json.dumps(value, sort_keys=True)
