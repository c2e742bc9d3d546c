"""Temporary."""

import torch

from nested_learning.memory.engines import generic
from nested_learning.memory.fused import apply, self_modifying, titans
from nested_learning.memory.running import MemoryState


def covers(system):
    return self_modifying.covers(system) or titans.covers(system)


def can_run(system, call):
    plain = not (call.padded or call.checked or call.traced)
    return plain and call.whole_chunks and covers(system)


def run(system, initial, state, inputs, boundaries, how):
    T = inputs.paths["k"].shape[2]
    whole = T - T % system.step
    first, rest = inputs, None
    if whole != T:
        first, rest = inputs.split([whole, T - whole])

    def gen(initial, weights, momentum, inputs, readouts):
        W = dict(weights)
        st = MemoryState(W, W, None if momentum is None else dict(momentum))
        y, after, _ = generic.run(system, initial, st, inputs, boundaries, how._replace(surprise=False))
        return y, after.current, after.momentum

    operands = how.dtype if how.dtype == torch.bfloat16 else None
    if titans.covers(system):
        y, W1, W2, S1, S2, surprise = apply(
            *titans.prepare(system, initial, state, first, how.surprise, gen, operands)
        )
        current, momentum = {"W1": W1, "W2": W2}, {"W1": S1, "W2": S2}
    else:
        y, W1, W2, surprise = apply(
            *self_modifying.prepare(
                system, initial, state, first, first.readouts, how.surprise, gen, operands
            )
        )
        current, momentum = {"W1": W1, "W2": W2}, None
    state = MemoryState(current, current, momentum, state.position, state.conv_tail)
    if rest is None:
        return y, state, surprise
    y2, state, s2 = generic.run(
        system, initial, state, rest, boundaries._replace(first=boundaries.first + whole), how
    )
    if surprise is not None:
        surprise = torch.cat([surprise, s2], dim=1)
    return torch.cat([y, y2], dim=2), state, surprise
