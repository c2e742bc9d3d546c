"""The operators that a compiled graph holds in the place of a run: nested_learning::read, and its gradient.

`read` gives results and what is saved for the backward pass, `read_backward` the gradients to those tensors
that want one. Neither changes what it is given nor returns a part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.memory.engines.operator import kept, pieces
from nested_learning.memory.engines.operator.plan import (
    RunPlan,
    read_plan,
    state_names,
    states_like,
)


@torch.library.custom_op(
    "nested_learning::read", mutates_args=(), schema="(Tensor[] tensors, str plan) -> Tensor[]"
)
def read(tensors: list[Tensor], plan: str) -> list[Tensor]:
    """Results by `RunPlan.results`, then what is saved.

    Args:
        tensors: by `RunPlan.names`, paths [B, T, H, d].
        plan: text of a `RunPlan`.
    """
    what = read_plan(plan)
    results, saved = pieces.forward(what, _named(what, tensors))
    return [*results, *saved]


@read.register_fake
def _(tensors: list[Tensor], plan: str) -> list[Tensor]:
    what = read_plan(plan)
    given = _named(what, tensors)
    B, T, H, d = given["q"].shape
    y = given["q"].new_empty(B, T, H, d)
    results = [y, *states_like(given, state_names(what.system, not what.aligned))]
    if what.surprise:
        results.append(y.new_empty(B, T))
    if what.saves == "segments":
        results += states_like(given, what.between(), (T - 1) // what.segment)
    elif what.saves == "chunks":
        results += kept.empty_rows(what, given, T // what.system.chunk_size)
        results += states_like(given, state_names(what.system, False)) if not what.aligned else []
    return results


@torch.library.custom_op(
    "nested_learning::read_backward",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor[] end, Tensor[] saved, Tensor[] grads, bool[] arrived, bool[] wanted, "
    "str plan) -> Tensor[]",
)
def read_backward(
    tensors: list[Tensor],
    end: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    arrived: list[bool],
    wanted: list[bool],
    plan: str,
) -> list[Tensor]:
    """Gradients to the tensors that are wanted.

    Args:
        end: results that are states.
        saved: by the forward pass.
        grads: to the results to which a gradient arrived.
        arrived: which of the results these are.
        wanted: which of the tensors want a gradient.
    """
    what = read_plan(plan)
    names = [name for name, there in zip(what.results(), arrived, strict=True) if there]
    given = _named(what, tensors)
    states = dict(zip(state_names(what.system, not what.aligned), end, strict=True))
    found = pieces.backward(what, given, states, saved, dict(zip(names, grads, strict=True)))
    return [
        found[name].contiguous() if name in found else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for (name, t), want in zip(given.items(), wanted, strict=True)
        if want
    ]


@read_backward.register_fake
def _(
    tensors: list[Tensor],
    end: list[Tensor],
    saved: list[Tensor],
    grads: list[Tensor],
    arrived: list[bool],
    wanted: list[bool],
    plan: str,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip(tensors, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    tensors, ctx.plan = inputs
    what = read_plan(ctx.plan)
    ctx.results, ctx.given = len(what.results()), len(tensors)
    states, saved = output[1 : ctx.results], output[ctx.results :]
    if what.surprise:
        states = states[:-1]
        ctx.mark_non_differentiable(output[ctx.results - 1], *saved)
    else:
        ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.states = len(states)
    ctx.save_for_backward(*tensors, *states, *saved)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None]:
    everything = ctx.saved_tensors
    tensors, rest = list(everything[: ctx.given]), everything[ctx.given :]
    arrived = [g is not None for g in grads[: ctx.results]]
    wanted = list(ctx.needs_input_grad[0])
    if not any(arrived):
        return [None] * len(tensors), None
    found = iter(
        read_backward(
            tensors,
            list(rest[: ctx.states]),
            list(rest[ctx.states :]),
            [g for g in grads[: ctx.results] if g is not None],
            arrived,
            wanted,
            ctx.plan,
        )
    )
    return [next(found) if want else None for want in wanted], None


read.register_autograd(_backward, setup_context=_setup_context)


def _named(plan: RunPlan, tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(plan.names, tensors, strict=True))
