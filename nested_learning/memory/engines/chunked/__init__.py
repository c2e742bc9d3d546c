"""Whole chunks of Titans and self-modifying Titans as one autograd function, written out for speed.

The generic engine stays the definition: here are whole chunks from a boundary on, without padding, with its
numbers. chunk.py has one chunk; here is one after the other, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.engines import compiler, generic
from nested_learning.memory.engines.chunked.chunk import (
    ChunkGradients,
    ChunkInputs,
    Kept,
    backward_chunk,
    forward_chunk,
)
from nested_learning.memory.engines.chunked.compiled_chunk import CompiledChunk
from nested_learning.memory.engines.chunked.memory import WeightMatrix
from nested_learning.memory.engines.chunked.scratch import Scratch
from nested_learning.memory.objective import L2
from nested_learning.memory.retention import Retention
from nested_learning.memory.running import Boundaries, Call, How, Inputs, MemoryState, Readouts
from nested_learning.memory.signals import PATH_OF
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem, learning_rule
from nested_learning.ops.context import full_precision

_GD, _DGD = (learning_rule(ResidualMLP(), L2(), rule) for rule in ("gd", "dgd"))


def covers(system: MemorySystem) -> bool:
    """Whether the algebra is written for this system: an MLP memory read after each token's write, by GD with
    momentum and static signals (Titans), or by DGD with self-generated signals and targets, without."""
    mlp = system.architecture
    if not (isinstance(mlp, ResidualMLP) and mlp == ResidualMLP(expansion=mlp.expansion)):
        return False
    if system.retention != Retention() or system.rate != "gated" or system.read != "token":
        return False
    if system.generated:
        return (
            system.generated in (("k", "v", "eta", "alpha"), ("k", "v", "q", "eta", "alpha"))
            and system.rule == _DGD
            and system.self_targets
            and not system.momentum
            and system.chunk_size == system.projection_chunk_size
        )
    return system.rule == _GD and system.momentum and not system.self_targets


class Given(NamedTuple):
    """The tensors that a run is a function of, or the gradients to them; None where the system has none."""

    W1: Tensor  # [B, N, H, d, e]
    W2: Tensor  # [B, N, H, e, d]
    S1: Tensor | None  # of the shapes of W1 and W2: the momentum
    S2: Tensor | None
    W2_init: Tensor  # [N, H, e, d]
    k: Tensor  # [B, H, T, d], and v and q: the input paths
    v: Tensor
    q: Tensor
    logits: Tensor | None  # [3, B, H, T] of eta, alpha and mu
    readout: Tensor | None  # [2, H, d] and bias [2, H] of eta and alpha
    bias: Tensor | None


def can_run(system: MemorySystem, call: Call) -> bool:
    """Systems that the algebra is written for, where at least one whole chunk begins at a common boundary."""
    looked_into = call.padded or call.checked or call.traced
    return call.whole_chunks and not looked_into and covers(system)


def run(
    system: MemorySystem,
    initial: Weights,
    state: MemoryState,
    inputs: Inputs,
    boundaries: Boundaries,
    how: How,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Results of `generic.run`: whole chunks by the algebra, the tokens after them by that engine."""
    tokens = inputs.paths["k"].shape[2]
    whole = tokens - tokens % system.chunk_size
    first, *rest = [inputs] if whole == tokens else inputs.split([whole, tokens - whole])
    y, state, surprise = run_chunks(system, initial, state, first, how)
    for piece in rest:
        boundaries = boundaries._replace(first=boundaries.first + whole)
        last, state, surprise_of_last = generic.run(system, initial, state, piece, boundaries, how)
        y = torch.cat([y, last], dim=2)
        if surprise is not None and surprise_of_last is not None:
            surprise = torch.cat([surprise, surprise_of_last], dim=1)
    return y, state, surprise


@dataclass(frozen=True)
class Run:
    """A run of whole chunks, apart from its tensors.

    `operands` is the dtype that the factors of products are rounded to, None for that of the weights;
    `compile_step` asks for chunks through torch.compile.
    """

    system: MemorySystem
    want_surprise: bool
    operands: torch.dtype | None
    compile_step: bool = False


def run_chunks(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, how: How
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """Run over whole chunks, from weights at a boundary of all memories."""
    call, given = described(system, initial, state, inputs, how)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        y, W1, W2, S1, S2, surprise = _Chunks.apply(call, *given)
    else:
        y, W1, W2, S1, S2, surprise = forward(call, given, None)
    after = {"W1": W1, "W2": W2}
    momentum = {"W1": S1, "W2": S2} if system.momentum else None
    return y, MemoryState(after, after, momentum, state.position, state.conv_tail), surprise


def described(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, how: How
) -> tuple[Run, Given]:
    """A run of whole chunks and its tensors."""
    W, S, paths = state.anchor, state.momentum, inputs.paths
    if system.momentum and S is None:
        S = {name: torch.zeros_like(w, requires_grad=False) for name, w in W.items()}
    S1, S2 = (None, None) if S is None else (S["W1"], S["W2"])
    gates = (inputs.gates, None, None) if inputs.readouts is None else (None, *inputs.readouts)
    given = Given(W["W1"], W["W2"], S1, S2, initial["W2"], paths["k"], paths["v"], paths["q"], *gates)
    # In float16 the gradients that pass through a chunk would not fit its range.
    operands = how.dtype if how.dtype == torch.bfloat16 else None
    return Run(system, how.surprise, operands, how.compile_step), given


class _Chunks(torch.autograd.Function):
    """`forward` and `backward`; by the generic engine where the latter is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, call: Run, *tensors: Tensor | None) -> tuple[Any, ...]:
        kept: list[Kept] = []
        outputs = forward(call, Given._make(tensors), kept.append)
        leaves, ctx.spec = pytree.tree_flatten(kept)
        ctx.call = call
        if outputs[-1] is not None:
            ctx.mark_non_differentiable(outputs[-1])
        ctx.save_for_backward(*tensors, *outputs[1:-1], *leaves)
        return outputs

    @staticmethod
    def backward(ctx: Any, gy: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        count = len(Given._fields)
        given, after, leaves = (
            Given._make(everything[:count]),
            everything[count : count + 4],
            everything[count + 4 :],
        )
        g_after = grads[:-1]  # the last is the surprise's
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(ctx.call, given, (gy, *g_after))
        with full_precision(gy.device):
            kept = pytree.tree_unflatten(list(leaves), ctx.spec)
            return None, *backward(ctx.call, given, after, kept, gy, g_after)


def _differentiable_backward(call: Run, given: Given, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients by the generic engine, as a graph that can be differentiated again."""
    # Views, as one input may be computed from another: W2 at the start of a sequence is W2_init, expanded.
    given = Given._make(None if t is None else t.view_as(t) for t in given)
    W, momentum, readouts = {"W1": given.W1, "W2": given.W2}, None, None
    if given.S1 is not None and given.S2 is not None:
        momentum = {"W1": given.S1, "W2": given.S2}
    if given.readout is not None and given.bias is not None:
        readouts = Readouts(given.readout, given.bias)
    y, after, _ = generic.run(
        call.system,
        {"W1": given.W1[0], "W2": given.W2_init},  # of W1's initial value nothing is used but its shape
        MemoryState(W, W, momentum),
        Inputs({"k": given.k, "v": given.v, "q": given.q}, given.logits, readouts),
        Boundaries(common=True),
        How("torch", given.W1.dtype),
    )
    outputs = (y, *after.current.values(), *(after.momentum or {}).values())
    wanted = [t for t in given if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            outputs,
            wanted,
            grads[: len(outputs)],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in given]


def _matrices(given: Sequence[Any], W2_init: Tensor) -> tuple[WeightMatrix, WeightMatrix]:
    """W1, W2, S1 and S2 [B, N, H, ...] as [N, B·H, ...]: a slice of memories is contiguous then."""
    rows: list[Any] = [None if t is None else t.transpose(0, 1).flatten(1, 2).contiguous() for t in given]
    W1, W2, S1, S2 = rows
    return WeightMatrix(W1, S1), WeightMatrix(W2, S2, W2_init)


def _batch_first(matrices: tuple[WeightMatrix, WeightMatrix], shape: tuple[int, int]) -> tuple[Any, ...]:
    """W1, W2, S1 and S2 as [B, N, H, ...], where `shape` is (B, H)."""
    m1, m2 = matrices
    return tuple(
        None if t is None else t.unflatten(1, shape).transpose(0, 1).contiguous()
        for t in (m1.W, m2.W, m1.S, m2.S)
    )


def _chunks(system: MemorySystem, given: Given, back: bool = False) -> Iterator[tuple[slice, ChunkInputs]]:
    """Columns and inputs of each chunk, the last first with `back`."""
    (B, _, T, _), size = given.k.shape, system.chunk_size
    paths = {"k": given.k, "v": given.v, "q": given.q}
    sources = [PATH_OF[name] for name in system.generated or ("k", "v")]
    readout = None if given.readout is None else given.readout.repeat(1, B, 1).unsqueeze(-2)
    bias = None if given.bias is None else given.bias.repeat(1, B).unsqueeze(-1)
    starts = range(0, T, size)
    for start in reversed(starts) if back else starts:
        now = slice(start, start + size)
        x = torch.stack([paths[name][:, :, now] for name in sources]).flatten(1, 2)
        q = None if "q" in system.generated else given.q[:, :, now].flatten(0, 1)
        logits = None if given.logits is None else given.logits[..., now].flatten(1, 2)
        yield now, ChunkInputs(x, q, logits, readout, bias)


def forward(call: Run, given: Given, keep: Callable[[Kept], object] | None) -> tuple[Any, ...]:
    """All chunks: y, W1, W2, S1, S2 and the surprise. `keep` gets what the backward pass needs of each."""
    B, H, T, _ = given.k.shape
    ws = Scratch(given.W1.dtype, call.operands)
    take: Callable[..., tuple[Any, ...]] = partial(forward_chunk, ws, call.system)
    if call.compile_step:
        compiled = CompiledChunk(
            given.W1, call.system, call.operands, call.want_surprise, keep=keep is not None
        )
        take = compiled.forward if compiler.takes(compiled.kind, B) else take
    W1, W2 = _matrices(given[:4], given.W2_init.repeat(1, B, 1, 1))
    y = torch.empty_like(given.q)
    surprise = y.new_empty(B, T) if call.want_surprise else None
    for columns, inputs in _chunks(call.system, given):
        # the weights after a chunk are the anchors of the next (eq 90)
        out, W1, W2, error, chunk = take(inputs, W1, W2)
        y[:, :, columns] = out.unflatten(0, (B, H))
        if surprise is not None:
            surprise[:, columns] = error.square().sum(-1).unflatten(0, (B, H)).sum(1).sqrt()
        if keep is not None:
            keep(chunk._replace(W2=chunk.W2._replace(W_init=None)))
        del chunk  # the next takes its memory, where nothing keeps it
    return y, *_batch_first((W1, W2), (B, H)), surprise


def backward(
    call: Run,
    given: Given,
    after: Sequence[Tensor | None],
    kept: Sequence[Kept],
    gy: Tensor,
    g_after: Sequence[Tensor | None],
) -> Given:
    """All chunks, the last first: the gradients to `given`.

    Args:
        after: W1, W2, S1 and S2 after the last chunk, [B, N, H, ...], and `g_after` the gradients to them.
        gy: [B, H, T, d].
    """
    B, H = given.k.shape[:2]
    ws = Scratch(given.W1.dtype, call.operands)
    take: Callable[..., tuple[Any, ChunkGradients]] = partial(backward_chunk, ws, call.system)
    if call.compile_step:
        compiled = CompiledChunk(given.W1, call.system, call.operands)
        take = compiled.backward if compiler.takes(compiled.kind, B) else take
    W2_init = given.W2_init.repeat(1, B, 1, 1)
    weights, g = _matrices(after, W2_init), _matrices(g_after, torch.zeros_like(W2_init))
    g_k, g_v, g_q = g_paths = [torch.empty_like(path) for path in (given.k, given.v, given.q)]
    per_chunk: list[Tensor] = []  # gradients to the logits
    g_readout: Tensor | None = None
    for chunk, (columns, inputs) in zip(reversed(kept), _chunks(call.system, given, back=True), strict=True):
        chunk = chunk._replace(W2=chunk.W2._replace(W_init=W2_init))
        g_out = gy[:, :, columns].flatten(0, 1)
        g, found = take(inputs, chunk, weights, g, g_out)
        weights = chunk.W1, chunk.W2
        for g_path, value in zip(g_paths, (found.k, found.v, found.q), strict=True):
            g_path[:, :, columns] = value.unflatten(0, (B, H))
        per_chunk.insert(0, found.logits)
        if found.readout is not None:
            g_readout = found.readout if g_readout is None else g_readout + found.readout
    logits = torch.cat(per_chunk, dim=-1).unflatten(1, (B, H))
    if g_readout is None:
        g_gates = logits, None, None
    else:
        g_gates = None, g_readout.squeeze(-2).unflatten(1, (B, H)).sum(1), logits.sum((1, 3))
    g_W1, g_W2, g_S1, g_S2 = _batch_first(g, (B, H))
    assert g[1].W_init is not None
    g_W2_init = g[1].W_init.unflatten(1, (B, H)).sum(1)
    return Given(g_W1, g_W2, g_S1, g_S2, g_W2_init, g_k, g_v, g_q, *g_gates)
