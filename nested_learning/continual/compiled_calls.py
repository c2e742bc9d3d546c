"""The base model through torch.compile while deltas are in force: a few graphs for texts of any length.

What a scope of deltas changes are tensors that a graph takes: weights by their names in the modules, factors
as an attribute of the module whose hook adds them. (A hook that holds them would be a constant of the graph,
which would be compiled anew in every scope.) Lengths of text and context are symbols. There are graphs for
one token and for several, with and without a context and gradients, and for what `generate` adds to a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nested_learning.continual.find import is_quantised
from nested_learning.continual.reader import Reader
from nested_learning.ops.compiling import Compiled

BACKEND: Any = "inductor"
MOST_GRAPHS = 64  # of one model; torch allows eight, and runs plainly where they do not do


def compiled_call(reader: Reader, options: Mapping[str, Any]) -> Compiled:
    """The call of a base model that takes the place of its own; plain from the compiler's first failure on.

    Args:
        reader: reader with the deltas.
        options: options of torch.compile.

    Raises:
        ValueError: what changes from scope to scope is no tensor of a graph: with gradient checkpointing,
            recurrent layers, deltas on stacks of experts or on quantised weights.
    """
    reasons = []
    if reader.plan.gradient_checkpointing:
        reasons.append("gradient_checkpointing wraps the layers anew in every scope")
    if reader.contexts.has_states:
        reasons.append("the model has recurrent layers, whose states are taken out of each call")
    for target in (target for writer in reader.writers for target in writer.targets):
        if target.stack or is_quantised(target.weight):
            kind = "a stack of experts" if target.stack else "quantised"
            reasons.append(f"{target.name} is {kind}, whose deltas are put together within the call")
    if reasons:
        raise ValueError(f"{reasons[0]}, which would be compiled every time: leave out compile")
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_GRAPHS)
    return Compiled(_forward, "the base model", **{"backend": BACKEND, "dynamic": True, **options})


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model.forward(*args, **kwargs)
