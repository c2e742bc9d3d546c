"""Classes, dtypes, shapes and ranges of a model's states, found by running it on the meta device."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nested_learning.layers.attention.mac import ContextState
from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.layers.cms.writer import CMSState
from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.memory.running import MemoryState
from nested_learning.memory.state import State

if TYPE_CHECKING:
    from nested_learning.models.hope.configuration_hope import HopeConfig

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KNOWN_MOST = 16  # configurations that are kept


@dataclass(frozen=True)
class ExpectedState:
    """One of a model's states, as far as it is known before it is seen.

    Attributes:
        kind: class of the state.
        dtypes: dtype of each tensor, by its name in `State.to_tensors`; a floating one may be any.
        shapes: shape of each without the batch; None where it grows with the tokens.
        ranges: least and largest value of whole numbers; None for one below the number of columns.
    """

    kind: type[State]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int | None, ...]]
    ranges: dict[str, tuple[int, int | None]]

    def check(self, name: str, fields: dict[str, Tensor], columns: int) -> None:
        """Raise unless the tensors are those of such a state after so many columns.

        Raises:
            ValueError: a tensor is missing or too many, or has another kind of numbers, another shape, or a
                value out of its range.
        """
        if fields.keys() != self.shapes.keys():
            lacks, extra = (
                sorted(self.shapes.keys() - fields.keys()),
                sorted(fields.keys() - self.shapes.keys()),
            )
            raise ValueError(f"state {name} lacks {lacks} and has {extra} too many")
        grown = set()
        for field, tensor in fields.items():
            where, dtype, shape = f"{name}/{field}", self.dtypes[field], self.shapes[field]
            fits = tensor.dtype in FLOATING if dtype.is_floating_point else tensor.dtype == dtype
            if not fits:
                kind = "floating-point numbers" if dtype.is_floating_point else str(dtype)
                raise ValueError(f"{where} is {tensor.dtype}, expected {kind}")
            got = tuple(tensor.shape[1:])
            if len(got) != len(shape) or any(
                want not in (None, n) for want, n in zip(shape, got, strict=True)
            ):
                wanted = ["B", *("S" if n is None else n for n in shape)]
                raise ValueError(
                    f"{where} has shape {list(tensor.shape)}, expected {str(wanted).replace(chr(39), '')}"
                )
            grown |= {n for want, n in zip(shape, got, strict=True) if want is None}
            if field in self.ranges and tensor.numel():
                self._check_range(where, tensor, *self.ranges[field], columns)
        if len(grown) > 1 or max(grown, default=0) > columns:
            raise ValueError(f"state {name} holds {sorted(grown)} tokens after {columns} columns")

    @staticmethod
    def _check_range(where: str, tensor: Tensor, low: int, high: int | None, columns: int) -> None:
        high = columns - 1 if high is None else high
        least, most = int(tensor.min()), int(tensor.max())
        if least < low or most > high:
            wrong = least if least < low else most
            raise ValueError(f"{where} has the value {wrong}, expected {low} to {high}")


_known: dict[str, dict[str, ExpectedState]] = {}


def expected_states(config: HopeConfig) -> dict[str, ExpectedState]:
    """The states of a model of this configuration, by name."""
    key = f"{config.fingerprint()} {config.vocab_size}"
    if key not in _known:
        if len(_known) >= KNOWN_MOST:
            _known.clear()
        _known[key] = _find(config)
    return _known[key]


def _find(config: HopeConfig) -> dict[str, ExpectedState]:
    """The states of all blocks, from a model with one block of each kind."""
    mixers = list(dict.fromkeys(config.layer_mixers))
    small = copy.deepcopy(config)
    small.compile_step = False
    small.mixer, small.num_hidden_layers = mixers, len(mixers)
    try:
        found = _find_on("meta", small)
    except (NotImplementedError, RuntimeError):  # a mixer of others' that looks at its numbers
        found = _find_on("cpu", small)
    alike = {f"layers.{i}.": f"layers.{mixers.index(name)}." for i, name in enumerate(config.layer_mixers)}
    names = {name: re.sub(r"^layers\.\d+\.", lambda m: alike[m[0]], name) for name in config.state_names}
    return {name: found[same] for name, same in names.items() if same in found}


@torch.no_grad()
def _find_on(device: str, config: HopeConfig) -> dict[str, ExpectedState]:
    with torch.device(device):
        # transformers knows the class; to import it here would close a circle.
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        one, two = (
            model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values.states
            for length in (1, 2)
        )
    # A mixer's state at the start of the running chunk is one of its states, but does not grow by each token.
    kinds = {name: name.replace(".start", ".mixer") for name in one}
    return {name: _expected(kind, one[kind], two[kind], model) for name, kind in kinds.items()}


def _expected(name: str, one: State, two: State, model: Any) -> ExpectedState:
    """The state of one name, from those after one token and after two."""
    first, second = one.to_tensors(), two.to_tensors()
    shapes = {
        field: tuple(n if n == m else None for n, m in zip(t.shape[1:], second[field].shape[1:], strict=True))
        for field, t in first.items()
    }
    ranges = dict(_ranges(one, "", _module(name, model), model.config.vocab_size))
    return ExpectedState(type(one), {field: t.dtype for field, t in first.items()}, shapes, ranges)


def _module(name: str, model: Any) -> nn.Module:
    """The module with the state of this name: "layers.0.mixer", "layers.0.cms", "pending" (the model)."""
    parts = name.split(".")
    if len(parts) < 3:
        return model
    layer = model.get_submodule(f"{model.base_model_prefix}.layers.{parts[1]}")
    return layer.cms if parts[2] == "cms" else layer.mixer


def _ranges(
    state: State, prefix: str, module: Any, vocab_size: int
) -> Iterable[tuple[str, tuple[int, int | None]]]:
    """Per field of whole numbers, its least and largest value."""
    if isinstance(state, MemoryState):
        memory = next(m for m in module.modules() if isinstance(m, MemoryLayer))
        yield f"{prefix}position", (0, memory.system.period - 1)
    elif isinstance(state, CMSState):
        yield f"{prefix}position", (0, module.levels[-1].chunk_size - 1)
    elif isinstance(state, AttentionState):
        yield f"{prefix}positions", (-1, None)
    elif isinstance(state, ContextState):
        yield f"{prefix}position", (0, module.segment - 1)
    elif type(state).__name__ == "PendingChunk":  # defined above the cache
        yield f"{prefix}ids", (0, vocab_size - 1)
        yield f"{prefix}count", (0, state.to_tensors()["ids"].shape[1])
    for field, inner in vars(state).items():
        if isinstance(inner, State):
            yield from _ranges(inner, f"{prefix}{field}.", module, vocab_size)
