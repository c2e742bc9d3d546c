"""A run of memories as an operator has it: a text that says what is to be done, and tensors under names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.engines import chunked
from nested_learning.memory.running import Boundaries, How, Inputs, MemoryState, Readouts
from nested_learning.memory.state import Weights
from nested_learning.memory.system import SYSTEMS, MemorySystem

# Chunks of a segment, of which the backward pass keeps the state before it and computes the rest again.
SEGMENT = 8


class RunPlan(NamedTuple):
    """All that a run depends on besides its tensors.

    Attributes:
        saves: "nothing" without gradients; what the backward pass needs of "chunks", by the written-out
            algebra; or the states before "segments", which are computed again.
        aligned: the run ends where all memories take new anchors: the current weights are the anchors.
        names: of the tensors that go in, in their order.
    """

    saves: str
    aligned: bool
    common: bool  # as in `Boundaries`
    backend: str  # this and the next three as in `How`
    dtype: torch.dtype
    surprise: bool
    compile_step: bool
    names: tuple[str, ...]
    system: MemorySystem

    @property
    def segment(self) -> int:
        """Tokens of a segment: boundaries of all memories coincide at its ends."""
        return SEGMENT * max(self.system.chunk_sizes)

    @property
    def how(self) -> How:
        return How(self.backend, self.dtype, self.surprise, self.compile_step)

    def results(self) -> list[str]:
        """Names of the tensors that come out, before those that are saved."""
        return ["y", *state_names(self.system, not self.aligned), *["surprise"] * self.surprise]

    def between(self) -> list[str]:
        """Names of the tensors of a state between two segments."""
        return state_names(self.system, not (self.system.exact or self.common))

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of the pieces that the run is cut into."""
        if self.saves == "chunks":
            whole = tokens - tokens % self.system.chunk_size
            return [whole, tokens - whole] if tokens > whole else [whole]
        if self.saves == "segments" and tokens > self.segment:
            count = (tokens - 1) // self.segment
            return [*[self.segment] * count, tokens - count * self.segment]
        return [tokens]


def written(
    plan: tuple[str, bool, bool, str, torch.dtype, bool, bool], names: Sequence[str], key: str
) -> str:
    """The text of a plan: the same in every process, as compiled graphs are kept on disk."""
    return "|".join([*[str(field) for field in plan], ",".join(names), key])


@cache
def read_plan(text: str) -> RunPlan:
    """The plan of a text."""
    saves, aligned, common, backend, dtype, surprise, compile_step, names, key = text.split("|", 8)
    system = SYSTEMS[key]
    if saves == "chunks" and not chunked.covers(system):
        saves = "segments"
    return RunPlan(
        saves,
        aligned == "True",
        common == "True",
        backend,
        getattr(torch, dtype.removeprefix("torch.")),
        surprise == "True",
        compile_step == "True",
        tuple(names.split(",")),
        system,
    )


# Tensors by name: paths are [B, T, H, d] here, in the order in which projections come. ---------------------


def state_names(system: MemorySystem, anchors: bool) -> list[str]:
    """Names of the tensors of a state, with or without anchors that differ from the current weights."""
    fields = ["current", *["anchor"] * anchors, *["momentum"] * system.momentum]
    return [f"{field}.{name}" for field in fields for name in system.architecture.matrices]


def named(initial: Weights, state: MemoryState, inputs: Inputs, boundaries: Boundaries) -> dict[str, Tensor]:
    """The tensors that a run is a function of; weights that are anchors are there once."""
    weights = {"current": state.current, "initial": initial}
    if not state.at_anchor:
        weights["anchor"] = state.anchor
    if state.momentum is not None:
        weights["momentum"] = state.momentum
    tensors = {f"{field}.{name}": W for field, value in weights.items() for name, W in value.items()}
    tensors.update({name: x.transpose(1, 2) for name, x in inputs.paths.items()})
    readout, bias = (None, None) if inputs.readouts is None else inputs.readouts
    others = {
        "gates": inputs.gates,
        "readout": readout,
        "bias": bias,
        "real": inputs.real,
        "offset": boundaries.offset,
        "end": boundaries.end,
    }
    tensors.update({name: t for name, t in others.items() if t is not None})
    return tensors


def weights_in(tensors: Mapping[str, Tensor], field: str) -> Weights:
    """Per matrix the tensors of a field; empty where it is not there."""
    start = f"{field}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def of_state(name: str) -> bool:
    """Whether a tensor of this name is part of a state."""
    return name.startswith(("current.", "anchor.", "momentum."))


def state_in(tensors: Mapping[str, Tensor]) -> MemoryState:
    """The state among named tensors, without what is only handed through."""
    current = weights_in(tensors, "current")
    return MemoryState(
        weights_in(tensors, "anchor") or current, current, weights_in(tensors, "momentum") or None
    )


def inputs_in(tensors: Mapping[str, Tensor]) -> Inputs:
    """The inputs among named tensors."""
    paths = {name: tensors[name].transpose(1, 2) for name in ("k", "v", "q")}
    readouts = Readouts(tensors["readout"], tensors["bias"]) if "readout" in tensors else None
    return Inputs(paths, tensors.get("gates"), readouts, tensors.get("real"))


def state_tensors(state: MemoryState, names: Sequence[str]) -> list[Tensor]:
    """The tensors of a state by these names."""
    fields = {"current": state.current, "anchor": state.anchor, "momentum": state.momentum or {}}
    return [fields[field][matrix] for field, _, matrix in (name.partition(".") for name in names)]


def states_like(
    given: Mapping[str, Tensor], names: Sequence[str], *front: int | torch.SymInt
) -> list[Tensor]:
    """Empty tensors for a state, or with a size in front for several."""
    like = [given[f"current.{name.partition('.')[2]}"] for name in names]
    return [W.new_empty(*front, *W.shape) for W in like]
