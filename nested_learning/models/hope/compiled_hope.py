"""Blocks through torch.compile, one token at a time: how generation is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.memory.state import State
from nested_learning.ops.compiling import Compiled
from nested_learning.ops.context import traced


class CompiledBlocks:
    """Runs a block on one token of each row by a compiled graph, and on anything else as it is.

    Blocks of one kind share their graph, so compiling takes as long for four layers as for one. The graph is
    that of any token at any position: the model counts columns outside of it, and a state keeps its shape
    (`steady`). Only full attention's grows; there the graph leaves the length open.

    Args:
        config: options of torch.compile. The mode "reduce-overhead", the default there, replays CUDA graphs
            over fixed addresses, where the next token would overwrite the states of this one: it is taken as
            no mode.
    """

    def __init__(self, config: CompileConfig) -> None:
        self.config = config
        self._options = {**config.to_dict(), "backend": config.backend}  # not a copy of it
        if config.mode == "reduce-overhead":
            del self._options["mode"]
        self._steps: dict[type, Compiled] = {}  # by the kind of mixer
        self._works = True  # the compiler has not failed

    def __reduce__(self) -> tuple[type[CompiledBlocks], tuple[CompileConfig]]:
        """A copy compiles anew."""
        return CompiledBlocks, (self.config,)

    def run(self, block: Any, x: Tensor, states: tuple[State | None, State | None], *args: Any) -> Any:
        """`block(x, states, *args)`; the last of `args` are its options by name."""
        *inputs, options = args
        documents = inputs[-1]
        one = x.shape[1] == 1 and documents is None and states[0] is not None
        if not (one and self._works) or torch.is_grad_enabled() or traced():
            return block(x, states, *inputs, **options)
        kind = type(block.mixer)
        if kind not in self._steps:
            self._steps[kind] = Compiled(_step, "a block that reads one token", **self._options)
        before = tuple(
            None if state is None else _opened(steady(module, state).unshared())
            for module, state in zip((block.mixer, block.cms), states, strict=True)
        )
        out = self._steps[kind](block, x, before, inputs[:-1], options)
        self._works = self._steps[kind].works
        return out


def _step(
    block: nn.Module,
    x: Tensor,
    states: tuple[State | None, State | None],
    inputs: Sequence[Any],
    options: dict[str, Any],
) -> Any:
    """A block on one token, with states such as it takes."""
    y, after, *surprise = block(x, states, *inputs, **options)
    return y, tuple(None if s is None else s.unshared() for s in after), *surprise


def steady(module: Any, state: State) -> State:
    """The state in the shape that it will keep from token to token, as far as its layer can give it one."""
    return module.steady(state) if hasattr(module, "steady") else state


def _opened(state: State) -> State:
    """The same state; torch.compile is told which lengths grow from token to token."""
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        inner = getattr(state, field.name)
        if isinstance(inner, State):
            _opened(inner)
    if isinstance(state, AttentionState):
        for tensor, dim in ((state.key, 2), (state.value, 2), (state.positions, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return state
