"""Blocks through torch.compile, one token at a time: how generation is compiled."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.layers.token_inputs import is_plain
from nested_learning.memory.state import State
from nested_learning.ops.compiling import Compiled
from nested_learning.ops.context import traced

_OWN = ("torch.nn.modules.", "nested_learning.")  # modules whose classes say all that they do


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
        self._steps: dict[Hashable, Compiled] = {}  # by kind of block
        self._made: dict[int, tuple[weakref.ref[State], ...]] = {}  # by block, the states of its last step
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
        built, kind = _kind(block)
        if kind not in self._steps:
            how = self._options | (_faster(self._options, x.device) if built else {})
            self._steps[kind] = Compiled(_step, "a block that reads one token", **how)
        made = self._made.get(id(block), ())
        before = tuple(
            state
            if state is None or any(state is ref() for ref in made)  # as a step has left it
            else _opened(steady(module, state).unshared())
            for module, state in zip((block.mixer, block.cms), states, strict=True)
        )
        out = self._steps[kind](block, x, before, inputs[:-1], options)
        self._works = self._steps[kind].works
        self._made[id(block)] = tuple(weakref.ref(state) for state in out[1] if state is not None)
        return out


def _kind(block: Any) -> tuple[bool, Hashable]:
    """Whether a block is as this package builds it, and what those have in common that share a compiled step:
    the options of their mixer, and their modules.

    What others have put into a block (adapters, hooks, parametrizations, quantised weights) may differ from
    layer to layer and change between two tokens by anything that they hold: the compiler has to look at it.
    """
    built, modules = True, []
    for m in block.modules():
        built = built and type(m).__module__.startswith(_OWN) and is_plain(m, kinds=None)
        modules.append((type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)))
    return built, (built, block.mixer_name, tuple(modules))


def _faster(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Options of torch.compile for a step that takes a millisecond, beside those that are given.

    Whether a block as it was built is one of its kind is known here (`_kind`), so that the compiled step need
    not look at each of its modules again; on a CPU the kernels are called from C++.
    """
    if given.get("mode") not in (None, "default") or given.get("options"):
        return {}
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if given.get("backend") == "inductor" and device.type == "cpu":
        options["cpp_wrapper"] = True
    return {"mode": None, "options": options}


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
