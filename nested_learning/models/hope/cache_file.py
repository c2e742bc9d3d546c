"""The file of a `HopeCache`: states, counts of the rows, and all that must fit before they are taken over."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nested_learning._tensor_files import check_whole, parse_json, read_tensors, write_tensors
from nested_learning.memory.state import State
from nested_learning.models.hope.expected_states import ExpectedState, expected_states

if TYPE_CHECKING:
    from nested_learning.models.hope.configuration_hope import HopeConfig

MOST = 2**63 - 1


class FileForm(NamedTuple):
    """A kind of file of states.

    Attributes:
        name: class whose values it holds, for messages.
        kind: name of the file, for messages.
        format: format that its metadata names.
        version: version that is written.
        checked: for each earlier version that can be read, the metadata that the checksum of a file covers
            which does not list it.
    """

    name: str
    kind: str
    format: str
    version: str
    checked: Mapping[str, tuple[str, ...]]


CACHE = FileForm(
    "HopeCache", "cache", "nested_learning.hope_cache", "3", {"2": ("fingerprint", "columns", "states")}
)


class Saved(NamedTuple):
    """The content of a cache.

    Attributes:
        states: by name, such as "layers.0.mixer"; every tensor has the batch as first dimension.
        tokens_seen: [B] int64.
        prefix_hash: [B] int64, or None.
        columns: number of columns fed, padding included.
    """

    states: dict[str, State]
    tokens_seen: Tensor
    prefix_hash: Tensor | None
    columns: int


def write_cache(
    path: str | os.PathLike[str], config: HopeConfig, saved: Saved, notes: Mapping[str, str]
) -> None:
    """Write a cache and metadata of the caller's; errors as `HopeCache.save`."""
    tensors = {"tokens_seen": saved.tokens_seen}
    if saved.prefix_hash is not None:
        tensors["prefix_hash"] = saved.prefix_hash
    index = {}
    for name, state in saved.states.items():
        fields = state.to_tensors()
        index[name] = {"class": type(state).__name__, "fields": sorted(fields)}
        tensors.update({f"{name}/{field}": tensor for field, tensor in fields.items()})
    # Fields may share memory (an anchor is the current weight until the next boundary); files may not.
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "format": CACHE.format,
        "version": CACHE.version,
        "fingerprint": config.fingerprint(),
        "columns": str(saved.columns),
        "states": json.dumps(index),
    }
    write_tensors(path, tensors, {**notes, **metadata})


def read_cache(path: str | os.PathLike[str], config: HopeConfig) -> Saved:
    """The content of a file, on the CPU; errors as `HopeCache.load`."""
    tensors, metadata = read_of_model(path, CACHE, config)
    try:
        return _content(config, tensors, metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {what}") from error


def read_of_model(
    path: str | os.PathLike[str], form: FileForm, config: HopeConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a whole file of states that a model of `config` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, another version, damaged, or of another configuration.
    """
    tensors, metadata = read_tensors(path, form.kind)
    if metadata.get("format") != form.format:
        raise ValueError(f"{path} is a safetensors file, but not a saved {form.name}")
    version = metadata.get("version")
    if version not in (form.version, *form.checked):
        raise ValueError(
            f"{path} has {form.kind} format version {version!r}, this package reads "
            f"{', '.join(map(repr, (*form.checked, form.version)))}"
        )
    try:
        check_whole(tensors, metadata, form.checked.get(version))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if metadata.get("fingerprint") != config.fingerprint():
        raise ValueError(
            f"{path} was saved by a model with another configuration (fingerprint "
            f"{str(metadata.get('fingerprint'))[:12]}…, this model has {config.fingerprint()[:12]}…); "
            "load it with the model that wrote it"
        )
    return tensors, metadata


def _content(config: HopeConfig, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Saved:
    columns = _columns(metadata["columns"])
    tokens_seen, prefix_hash = tensors.pop("tokens_seen"), tensors.pop("prefix_hash", None)
    for name, counts in (("tokens_seen", tokens_seen), ("prefix_hash", prefix_hash)):
        if counts is not None and (counts.dtype != torch.int64 or counts.ndim != 1):
            raise ValueError(f"{name} is {counts.dtype} {list(counts.shape)}, expected int64 [B]")
    if len(tokens_seen) and not 0 <= int(tokens_seen.min()) <= int(tokens_seen.max()) <= columns:
        raise ValueError(
            f"tokens_seen has counts {tokens_seen.tolist()}, expected 0 to {columns}, the columns"
        )
    rows = len(tokens_seen)
    for name, tensor in [*tensors.items(), *([] if prefix_hash is None else [("prefix_hash", prefix_hash)])]:
        if tensor.ndim == 0 or len(tensor) != rows:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {rows} rows")
    index = parse_json(metadata["states"])
    if not isinstance(index, dict) or set(index) != set(config.state_names):
        found = sorted(index) if isinstance(index, dict) else index
        raise ValueError(f"it has states {found}, the model needs {sorted(config.state_names)}")
    expected = expected_states(config)
    states = {}
    for name, entry in index.items():
        fields = {field: tensors.pop(f"{name}/{field}") for field in entry["fields"]}
        states[name] = _state(name, entry["class"], fields, expected[name], columns)
    if tensors:
        raise ValueError(f"unexpected tensors {', '.join(sorted(tensors))}")
    return Saved(states, tokens_seen, prefix_hash, columns)


def _columns(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) > MOST:
        raise ValueError(f"columns is {text[:30]!r}, expected a whole number")
    return int(text)


def _state(name: str, kind: str, fields: dict[str, Tensor], expected: ExpectedState, columns: int) -> State:
    if kind != expected.kind.__name__:
        raise ValueError(f"state {name} is a {kind}, the model's is a {expected.kind.__name__}")
    state = complete(expected.kind.from_tensors(fields), name)
    expected.check(name, fields, columns)
    return state


def complete(state: State, name: str) -> State:
    """`state`, unless a field is absent that its class does not declare optional."""
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        if getattr(state, field.name) is None and "None" not in str(field.type):
            raise ValueError(f"state {name} ({type(state).__name__}) lacks {field.name}")
    return state
