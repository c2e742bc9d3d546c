"""Whole chunks of self-modifying Titans as one autograd function, for speed.

The generic step (scan.py) stays the definition: this covers the training case alone, whole chunks from a
boundary on, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.description import MemorySystem, learning_rule
from nested_learning.memory.fused_backward import ChunkInputs, backward_chunk
from nested_learning.memory.fused_chunk import (
    Generated,
    Layout,
    Memories,
    Read,
    Scratch,
    Written,
    finish,
    generate,
    read,
    write,
)
from nested_learning.memory.objective import L2
from nested_learning.memory.retention import Retention

if TYPE_CHECKING:
    from nested_learning.memory.scan import RunningWeights
    from nested_learning.memory.signals import Readouts, StepInputs

# y, W1, W2 after the last chunk, from W1, W2, W2_init, the paths k, v, q, and the readouts' weight and bias.
Reference = Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Inputs(NamedTuple):
    """The tensors that a run is a function of, in the order that `Reference` takes them."""

    W1: Tensor  # [B, N, H, d, e]
    W2: Tensor  # [B, N, H, e, d]
    W2_init: Tensor  # [N, H, e, d]
    k: Tensor  # [B, H, T, d], and v and q
    v: Tensor
    q: Tensor
    weight: Tensor  # [2, H, d]
    bias: Tensor  # [2, H]


class _Saved(NamedTuple):
    """What the backward pass needs of one chunk."""

    W1: Tensor  # [N, M, d, e] before the chunk
    W2: Tensor  # [N, M, e, d]
    made: Generated
    kept: Written
    out: Read


_GENERATED = (("k", "v", "eta", "alpha"), ("k", "v", "q", "eta", "alpha"))


_RULE = learning_rule(ResidualMLP(), L2(), "dgd")


def supports(system: MemorySystem, weights: RunningWeights, inputs: StepInputs) -> bool:
    """Whether `run` covers this system, at a boundary of all its memories and without padding."""
    return (
        isinstance(system.architecture, ResidualMLP)
        and system.architecture == ResidualMLP(expansion=system.architecture.expansion)
        and system.rule == _RULE
        and system.retention == Retention()
        and system.generated in _GENERATED
        and system.self_targets
        and not system.momentum
        and system.read == "token"
        and system.chunk_size == system.projection_chunk_size
        and weights.anchor is weights.current
        and inputs.write is None
        # what follows a Python function symbolically sees more in the generic step
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def run(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts,
    want_surprise: bool,
    reference: Reference,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Run over whole chunks.

    Args:
        inputs: of T tokens, a multiple of the chunk length.
        reference: the same by the generic step, differentiated where second derivatives are wanted.

    Returns: y [B, H, T, d], surprise [B, T] or None, and the weights after the last chunk, the anchors of the
        next.
    """
    vectors = sum(name in ("k", "v", "q") for name in system.generated)
    layout = Layout(vectors, len(system.generated) - vectors, system.chunk_size, system.eta_max)
    tensors = _Inputs(
        weights.anchor["W1"],
        weights.anchor["W2"],
        initial["W2"],
        inputs.paths["k"],
        inputs.paths["v"],
        inputs.paths["q"],
        readouts.weight,
        readouts.bias,
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, W1, W2, surprise = _Run.apply(layout, reference, want_surprise, *tensors)
    else:
        y, W1, W2, surprise = _forward(layout, tensors, want_surprise, None)
    return y, surprise, {"W1": W1, "W2": W2}


def _memory_first(W: Tensor) -> Tensor:
    """[B, N, H, ...] -> [N, B·H, ...], a copy."""
    return W.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _batch_first(W: Tensor, batch: int) -> Tensor:
    """The inverse."""
    return W.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


def _per_row(t: Tensor, batch: int) -> Tensor:
    """[N, H, ...] -> [N, B·H, ...], a copy for each row of the batch."""
    return t.unsqueeze(1).expand(-1, batch, *t.shape[1:]).flatten(1, 2)


def _chunk_inputs(layout: Layout, given: _Inputs, columns: slice, readout: Tensor) -> ChunkInputs:
    k, v, q = (path[:, :, columns] for path in (given.k, given.v, given.q))
    x = torch.stack([k, v, q, k, k] if layout.adaptive_q else [k, v, k, k]).flatten(1, 2)
    return ChunkInputs(x, None if layout.adaptive_q else q.flatten(0, 1), readout)


def _columns(layout: Layout, T: int) -> list[slice]:
    """The columns of each chunk."""
    return [slice(start, start + layout.chunk_size) for start in range(0, T, layout.chunk_size)]


def _forward(
    layout: Layout, given: _Inputs, want_surprise: bool, saved: list[_Saved] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All chunks forward: y, W1, W2 and the surprise; what the backward pass needs goes into `saved`."""
    B, H, T, _ = given.k.shape
    W = Memories(_memory_first(given.W1), _memory_first(given.W2), _per_row(given.W2_init, B))
    readout, bias = _per_row(given.weight, B).unsqueeze(-2), _per_row(given.bias, B).unsqueeze(-1)
    y, ws = torch.empty_like(given.q), Scratch(W.W1)
    surprise = y.new_empty(B, T) if want_surprise else None
    for columns in _columns(layout, T):
        inputs = _chunk_inputs(layout, given, columns, readout)
        made = generate(ws, layout, W, inputs.x, readout, bias)
        k, v = made.vectors[0], made.vectors[1]
        q = made.vectors[2] if inputs.q is None else inputs.q
        kept, u, a = write(ws, W, k, v, made.eta, made.decay)
        out = read(ws, W, q, k, u[-1], a[-1], kept.B[-1], made.decay)
        y[:, :, columns] = (q + out.out).unflatten(0, (B, H))
        if surprise is not None:
            error = kept.answer[-1] + k - kept.target[-1]  # of the memory that is read out
            surprise[:, columns] = error.square().sum(-1).unflatten(0, (B, H)).sum(1).sqrt()
        if saved is not None:
            saved.append(_Saved(W.W1, W.W2, made, kept, out))
        W = finish(ws, W, k, u, a, kept.B, made.decay)
    return y, _batch_first(W.W1, B), _batch_first(W.W2, B), surprise


def _backward(
    layout: Layout, given: _Inputs, after: Memories, saved: list[_Saved], gy: Tensor, gW: Memories
) -> _Inputs:
    """All chunks backward, the last first: the gradients to `given`.

    Args:
        after: the weights after the last chunk.
        gW: the gradients to them; overwritten.
    """
    B, H, T, _ = given.k.shape
    readout = _per_row(given.weight, B).unsqueeze(-2)
    g_paths = [torch.empty_like(path) for path in (given.k, given.v, given.q)]
    g_readout, g_bias = torch.zeros_like(readout), torch.zeros_like(readout[..., 0, 0])
    ws = Scratch(after.W1)
    for columns, chunk in reversed(list(zip(_columns(layout, T), saved, strict=True))):
        W = Memories(chunk.W1, chunk.W2, after.W2_init)
        inputs = _chunk_inputs(layout, given, columns, readout)
        g = backward_chunk(
            ws,
            layout,
            W,
            after,
            inputs,
            (chunk.made, chunk.kept, chunk.out),
            gW,
            gy[:, :, columns].flatten(0, 1),
        )
        after = W
        g_readout += g.readout
        g_bias += g.logits.sum(-1)
        per_path = (g.x[0] + g.x[-2] + g.x[-1], g.x[1], g.x[2] if g.q is None else g.q)
        for g_path, value in zip(g_paths, per_path, strict=True):
            g_path[:, :, columns] = value.unflatten(0, (B, H))
    W2_init, weight, bias = (
        t.unflatten(1, (B, H)).sum(1) for t in (gW.W2_init, g_readout.squeeze(-2), g_bias)
    )
    g_k, g_v, g_q = g_paths
    return _Inputs(_batch_first(gW.W1, B), _batch_first(gW.W2, B), W2_init, g_k, g_v, g_q, weight, bias)


class _Run(torch.autograd.Function):
    """`_forward` and `_backward`; where the backward pass is itself to be differentiated, the reference."""

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, reference: Reference, want_surprise: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        saved: list[_Saved] = []
        outputs = _forward(layout, _Inputs._make(tensors), want_surprise, saved)
        leaves, ctx.spec = pytree.tree_flatten(saved)
        ctx.layout, ctx.reference = layout, reference
        if outputs[3] is not None:
            ctx.mark_non_differentiable(outputs[3])
        ctx.save_for_backward(*tensors, *outputs[1:3], *leaves)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, gy: Tensor, g_W1: Tensor, g_W2: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved_tensors = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        tensors, leaves = saved_tensors[:8], saved_tensors[8:]
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable_backward(ctx.reference, tensors, (gy, g_W1, g_W2))
        given, (W1, W2, *leaves) = _Inputs._make(tensors), leaves
        W2_init = _per_row(given.W2_init, given.k.shape[0])
        gW = Memories(_memory_first(g_W1), _memory_first(g_W2), torch.zeros_like(W2_init))
        after = Memories(_memory_first(W1), _memory_first(W2), W2_init)
        with torch.autocast(gy.device.type, enabled=False):
            saved = pytree.tree_unflatten(leaves, ctx.spec)
            return None, None, None, *_backward(ctx.layout, given, after, saved, gy, gW)


def _differentiable_backward(
    reference: Reference, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The same gradients from the generic step, as a graph that can be differentiated again."""
    # Views, as one input may be computed from another: W2 at the start of a sequence is W2_init, expanded.
    inputs = [t.view_as(t) for t in tensors]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            reference(*inputs), wanted, grads, create_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    return [next(found) if t.requires_grad else None for t in tensors]
