"""Signals with which a memory layer reads tokens, for those who look at what its memories do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.layers.memory.layer import MemoryLayer, Place
from nested_learning.layers.token_inputs import check_sequence
from nested_learning.memory.engines.generic import signals_and_target
from nested_learning.memory.running import Boundaries, Inputs, MemoryState
from nested_learning.memory.signals import Signals
from nested_learning.ops.context import full_precision


@torch.no_grad()
def signals_at(layer: MemoryLayer, x: Tensor, state: MemoryState | None = None) -> tuple[Signals, Tensor]:
    """Keys, values, queries, gates and targets with which the layer's forward pass reads x.

    Up to each boundary inside x the tokens are read, since signals may come from the anchor that moves there.

    Args:
        layer: the layer.
        x: [B, T, hidden_size], all of them real.
        state: of rows that stand at one place within their chunks; None for the initial memories.

    Returns: keys, values, queries [B, H, T, head_dim] and gates [B, H, T], and the targets v̂ of the memory
        that is read out [B, H, T, head_dim], in the precision of the states.

    Raises:
        ValueError: when x or the state does not fit, or rows stand at different places.
    """
    check_sequence(x, layer.hidden_size, None, layer.in_proj)
    if state is not None:
        layer.check_state(state, x)
        if state.position.unique().numel() > 1:
            raise ValueError(
                f"rows stand at different places of their chunks, {state.position.tolist()}; take them one "
                "by one: state.slice_rows"
            )
    parts, step = [], layer.system.step
    while x.shape[1]:
        position = 0 if state is None else int(state.position[0])
        count = x.shape[1] if layer.system.exact else step - position % step
        parts.append(_within_a_chunk(layer, x[:, :count], state))
        if count < x.shape[1]:
            state = layer.forward(x[:, :count], state)[1]
        x = x[:, count:]
    joined: Any = pytree.tree_map(lambda *t: None if t[0] is None else torch.cat(t, dim=2), *parts)
    return joined


def _within_a_chunk(layer: MemoryLayer, x: Tensor, state: MemoryState | None) -> tuple[Signals, Tensor]:
    nowhere = torch.zeros(len(x), dtype=torch.long, device=x.device)
    start = layer._start(state, nowhere, torch.promote_types(x.dtype, torch.float32))
    dtype = next(iter(start.current.values())).dtype
    logits, readouts = layer._gates(x, dtype)
    paths = layer.in_proj(x)
    with full_precision(x.device):
        place = Place(x, None, Boundaries(common=True), start.position)
        vectors, _, _ = layer._prepare(paths.to(dtype), place, start.conv_tail, None)
        return signals_and_target(layer.system, start.anchor, Inputs(vectors, logits, readouts))
