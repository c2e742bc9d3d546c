"""The one door to the engines: the first that can run a system on these tokens runs it.

An engine is a module of `engines` with `can_run(system, call)`, which decides from facts that are known
before the numbers are, and `run`, whose results are those of the generic engine to rounding.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from nested_learning.memory import check
from nested_learning.memory.engines import operator, token
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.context import one_operator, traced

# The most special first; the last runs everything.
ENGINES: tuple[ModuleType, ...] = (operator, token, *operator.WITHIN)


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Run the memories over T tokens.

    Args:
        initial: per matrix [N, H, out, in], the meta-learned initial memories, which retention may pull to.
        state: of the memories before the tokens; its position and its convolution's tail are handed through.

    Returns: y [B, H, T, d], the state after the tokens, and the surprise [B, T], None unless wanted.
    """
    tokens = inputs.paths["k"].shape[2]
    compiling = torch.compiler.is_compiling()
    operates = compiling and one_operator()
    call = Call(
        device=inputs.paths["k"].device.type,
        dtype=how.dtype,
        backend=how.backend,
        surprise=how.surprise,
        compile_step=how.compile_step,
        one_token=tokens == 1,
        whole_chunks=boundaries.common
        and not (operates or isinstance(tokens, torch.SymInt))  # to compare a symbol would fix it
        and tokens >= system.step,
        padded=inputs.real is not None,
        grad=torch.is_grad_enabled(),
        compiling=compiling,
        traced=traced(),
        checked=check.enabled(),
        one_operator=operates,
    )
    # A compiler looks through the cache of `choose`, and warns that it does.
    engine = choose.__wrapped__(system, call) if call.compiling else choose(system, call)
    return engine.run(system, initial, state, inputs, boundaries, how)


@cache
def choose(system: MemorySystem, call: Call) -> ModuleType:
    """The first engine that can run this system in such a call."""
    return next(engine for engine in ENGINES if engine.can_run(system, call))
