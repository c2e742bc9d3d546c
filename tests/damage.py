"""Damage to files, for hypothesis: to their bytes, and to what a safetensors file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nested_learning._tensor_files import checksum

JUNK = (
    None,
    True,
    -1,
    0,
    3,
    10**12,
    2**63,
    -(2**70),
    1.5,
    -0.5,
    1e300,
    "",
    "x",
    "7",
    [],
    [[]],
    {},
    [-1],
    {"a": 1},
)
DTYPES = (torch.bool, torch.int8, torch.int32, torch.int64, torch.float16, torch.float64, torch.complex64)


@st.composite
def damaged_bytes(draw: Any, content: bytes) -> bytes:
    """Content with flipped bits, a piece missing, too much, or overwritten."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "truncate", "append", "zero", "drop"]))
    at = draw(st.integers(0, len(content) - 1))
    length = draw(st.integers(1, 64))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if kind == "truncate":
        return content[:at]
    if kind == "append":
        return content + draw(st.binary(min_size=1, max_size=64))
    if kind == "zero":
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    return content[:at] + content[at + length :]


@st.composite
def damaged_json(draw: Any, value: Any) -> Any:
    """A JSON value with one part, somewhere inside, replaced, left out or added."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        action = draw(st.sampled_from(["inside", "inside", "inside", "drop", "add"]))
        if action == "inside":
            copy[key] = draw(damaged_json(value[key]))
        elif action == "drop":
            del copy[key]
        elif isinstance(copy, dict):
            copy["more"] = draw(st.sampled_from(JUNK))
        else:
            copy.append(draw(st.sampled_from([*JUNK, *value])))
        return copy
    if type(value) is int and draw(st.booleans()):
        return value + draw(st.sampled_from([-5, -1, 1, 7, 10**6, 10**12]))
    return draw(st.sampled_from(JUNK))


@st.composite
def damaged_tensor(draw: Any, t: torch.Tensor) -> torch.Tensor:
    """A tensor with other numbers, another dtype or another shape."""
    kind = draw(st.sampled_from(["dtype", "shape", "longer", "shorter", "values"]))
    if kind == "dtype":
        return t.to(draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        return draw(
            st.sampled_from([t.unsqueeze(0), t.flatten(), t.mT if t.ndim > 1 else t[..., None], t.sum()])
        )
    if t.ndim == 0 or kind == "values":
        factor = draw(st.sampled_from([-1, 0, 1_000_003]))
        return t ^ True if t.dtype == torch.bool else t * factor - draw(st.sampled_from([0, 5, 10**9]))
    dim = draw(st.integers(0, t.ndim - 1))
    if kind == "longer":
        return torch.cat([t, t], dim)
    return t.narrow(dim, 0, t.shape[dim] // 2)


@st.composite
def damaged_content(
    draw: Any, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata with one or two faults."""
    tensors, metadata = dict(tensors), dict(metadata)
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(
            st.sampled_from(["tensor", "tensor", "metadata", "metadata", "drop", "add", "swap", "drop key"])
        )
        name = draw(st.sampled_from(sorted(tensors)))
        key = draw(st.sampled_from(sorted(metadata)))
        if kind == "tensor":
            tensors[name] = draw(damaged_tensor(tensors[name]))
        elif kind == "metadata":
            try:
                metadata[key] = json.dumps(draw(damaged_json(json.loads(metadata[key]))))
            except ValueError:  # plain text
                metadata[key] = draw(
                    st.sampled_from(["", "x", "-5", "1000000000000", "[", metadata[key] + "0"])
                )
        elif kind == "drop" and len(tensors) > 1:
            del tensors[name]
        elif kind == "add":
            tensors[f"{name}x"] = tensors[name]
        elif kind == "swap":
            other = draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif kind == "drop key" and len(metadata) > 1:
            del metadata[key]
    return tensors, metadata


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def write_checked(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], legacy: tuple[str, ...] = ()
) -> None:
    """Write a safetensors file whose checksum, where it has one, is right, whatever it says.

    `legacy` are the names that a checksum covers where the file does not list them.
    """
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    try:
        if "sha256" in metadata and "checked" in metadata:
            names = [name for name in json.loads(metadata["checked"]) if name in metadata]
            metadata = {**metadata, "checked": json.dumps(names)}
            metadata["sha256"] = checksum(tensors, metadata, names)
        elif "sha256" in metadata and legacy:
            metadata = {**metadata, "sha256": checksum(tensors, metadata, legacy)}
    except (KeyError, TypeError, ValueError):
        pass  # the list of names itself is damaged
    save_file(tensors, path, metadata)


def check_refusal(error: ValueError, path: Path) -> None:
    """A refusal says in a sentence which file it is about, and shows nothing of the code."""
    message = str(error)
    assert str(path) in message
    assert len(message) > len(str(path)) + 20
    assert "Traceback" not in message
