"""The numbers of the operators: a run, piece by piece, and its gradient.

Where the chunk algebra is written out, what the backward pass needs of whole chunks is kept (kept.py).
Elsewhere the state before each segment is, and the backward pass computes a segment again, by whatever engine
is the first that can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from nested_learning.memory.engines import chunked, compiled, fla, generic
from nested_learning.memory.engines.operator import kept
from nested_learning.memory.engines.operator.plan import (
    RunPlan,
    inputs_in,
    of_state,
    state_in,
    state_names,
    state_tensors,
    states_like,
    weights_in,
)
from nested_learning.memory.running import Boundaries, Call, Inputs, MemoryState, Readouts
from nested_learning.ops.context import full_precision, recording

# Engines that can run a piece, in the order of `engine.ENGINES`.
WITHIN: tuple[ModuleType, ...] = (fla, chunked, compiled, generic)
_ALONG = {"k": 1, "v": 1, "q": 1, "gates": 3, "real": 1}  # dimension of the tokens


def forward(plan: RunPlan, given: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and what the backward pass needs besides them and what was given: new tensors all."""
    with torch.no_grad(), full_precision(given["k"].device):
        state, sizes = state_in(given), plan.sizes(given["k"].shape[1])
        ys, surprises, start = [], [], 0
        saved: list[Tensor] = []
        between: list[list[Tensor]] = []  # the states before all segments but the first
        for i, inputs in enumerate(_cut(given, sizes)):
            if plan.saves == "chunks" and i == 0:
                y, state, surprise, saved = kept.forward(plan, given, state, inputs)
            else:
                if i and plan.saves == "segments":
                    between.append(state_tensors(state, plan.between()))
                y, state, surprise = _run(plan, given, state, inputs, start)
            ys.append(y.transpose(1, 2))
            surprises.append(surprise)
            start += sizes[i]
        names = state_names(plan.system, not plan.aligned)
        results = [_joined(ys, 1), *(t.clone() for t in state_tensors(state, names))]
        if plan.surprise:
            results.append(_joined([s for s in surprises if s is not None], 1))
        if plan.saves == "segments":
            before = zip(*between, strict=True) if between else ()
            saved = [torch.stack(tensors) for tensors in before] or states_like(given, plan.between(), 0)
        return results, saved


def backward(
    plan: RunPlan,
    given: dict[str, Tensor],
    end: Mapping[str, Tensor],
    saved: Sequence[Tensor],
    grads: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients to what was given, by name, from those to results.

    Args:
        end: the results of the forward pass that are states.
    """
    with torch.no_grad(), full_precision(given["k"].device):
        sizes = plan.sizes(given["k"].shape[1])
        pieces, start = _cut(given, sizes), sum(sizes)
        found = {name: torch.zeros_like(given[name]) for name in _ALONG if name in given and name != "real"}
        slices = {name: g.split(sizes, dim=_ALONG[name]) for name, g in found.items()}
        g_y = grads["y"] if "y" in grads else torch.zeros_like(given["q"])
        g_ys = g_y.split(sizes, dim=1)
        g_state = {name: g for name, g in grads.items() if of_state(name)}
        for i in reversed(range(len(sizes))):
            start -= sizes[i]
            if plan.saves == "chunks" and i == 0:
                g = kept.backward(plan, given, saved, list(end.values()), g_ys[0], g_state)
            else:
                before = _before(plan, given, saved, i)
                g = _again(plan, before, pieces[i], start, g_ys[i], g_state)
            g_state = {name: value for name, value in g.items() if of_state(name)}
            for name, value in g.items():
                if name in slices:
                    slices[name][i].copy_(value)
                elif name not in g_state:
                    found[name] = found[name] + value if name in found else value.clone()
        return {**found, **{name: g.clone() for name, g in g_state.items()}}


def _before(
    plan: RunPlan, given: dict[str, Tensor], saved: Sequence[Tensor], piece: int
) -> dict[str, Tensor]:
    """What a piece starts from, in the place of what the run starts from."""
    if piece == 0:
        return given
    fixed = {name: t for name, t in given.items() if not of_state(name)}
    if plan.saves == "chunks":  # the state after the whole chunks
        after = kept.state_after(plan, given, saved)
        return {**fixed, **dict(zip(state_names(plan.system, False), after, strict=True))}
    return {**fixed, **{name: t[piece - 1] for name, t in zip(plan.between(), saved, strict=True)}}


def _cut(given: Mapping[str, Tensor], sizes: list[int]) -> list[Inputs]:
    inputs = inputs_in(given)
    return [inputs] if len(sizes) == 1 else inputs.split(sizes)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _run(
    plan: RunPlan, given: Mapping[str, Tensor], state: MemoryState, inputs: Inputs, start: int
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """The tokens of one piece by the first engine that can."""
    tokens = inputs.paths["k"].shape[2]
    call = Call(
        device=inputs.paths["k"].device.type,
        dtype=plan.dtype,
        backend=plan.backend,
        surprise=plan.surprise,
        compile_step=plan.compile_step,
        one_token=False,
        whole_chunks=plan.common and tokens >= plan.system.step and start % plan.system.period == 0,
        padded=inputs.real is not None,
        grad=torch.is_grad_enabled(),
        compiling=False,
        traced=False,
        checked=False,
        one_operator=False,
    )
    engine = next(e for e in WITHIN if e.can_run(plan.system, call))
    boundaries = Boundaries(plan.common, start, given.get("offset"), given.get("end"))
    return engine.run(plan.system, weights_in(given, "initial"), state, inputs, boundaries, plan.how)


def _again(
    plan: RunPlan,
    given: Mapping[str, Tensor],
    inputs: Inputs,
    start: int,
    g_y: Tensor,
    g_after: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One piece computed once more, and its gradients by autograd: to paths as [B, H, C, d]."""
    whole = {name: t for name, t in given.items() if name not in _ALONG and name not in ("offset", "end")}
    piece = {**whole, **inputs.paths}
    if inputs.gates is not None:
        piece["gates"] = inputs.gates
    with recording():
        leaves = {name: t.detach().requires_grad_() for name, t in piece.items()}
        readouts = Readouts(leaves["readout"], leaves["bias"]) if "readout" in leaves else None
        again = Inputs({n: leaves[n] for n in inputs.paths}, leaves.get("gates"), readouts, inputs.real)
        fixed = {name: t for name, t in given.items() if name in ("offset", "end")}
        y, after, _ = _run(plan, {**leaves, **fixed}, state_in(leaves), again, start)
        outputs = [y, *state_tensors(after, list(g_after))]
        pairs = [(o, g) for o, g in zip(outputs, [g_y.transpose(1, 2), *g_after.values()], strict=True)]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        ends, g_ends = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, list(leaves.values()), g_ends, allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {name: g.transpose(1, 2) if name in inputs.paths else g for name, g in gradients.items()}
