"""Whole chunks of self-modifying Titans as one autograd function, for speed.

The generic step (scan.py) stays the definition: this covers the training case alone, whole chunks from a
boundary on, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.description import RULES, MemorySystem
from nested_learning.memory.fused_backward import ChunkInputs, backward_chunk
from nested_learning.memory.fused_chunk import (
    Generated,
    Layout,
    Memories,
    Read,
    Written,
    decays,
    finish,
    generate,
    read,
    write,
)

if TYPE_CHECKING:
    from nested_learning.memory.scan import Readouts, RunningWeights, StepInputs

# y, W1, W2 after the last chunk, from W1, W2, W2_init, the paths k, v, q, and the readouts' weight and bias.
Reference = Callable[..., tuple[Tensor, Tensor, Tensor]]

_GENERATED = (("k", "v", "eta", "alpha"), ("k", "v", "q", "eta", "alpha"))


def supports(system: MemorySystem, weights: RunningWeights, inputs: StepInputs) -> bool:
    """Whether `run` covers this system, at a boundary of all its memories and without padding."""
    return (
        type(system.architecture) is ResidualMLP
        and system.rule == RULES["dgd"]
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
    reference: Reference,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run over whole chunks.

    Args:
        inputs: of T tokens, a multiple of the chunk length.
        reference: the same by the generic step, differentiated where second derivatives are wanted.

    Returns: y [B, H, T, d] and the weights after the last chunk, the anchors of the next.
    """
    vectors = sum(name in ("k", "v", "q") for name in system.generated)
    layout = Layout(vectors, len(system.generated) - vectors, system.chunk_size, system.eta_max)
    tensors = (
        weights.anchor["W1"],
        weights.anchor["W2"],
        initial["W2"],
        *(inputs.paths[name] for name in ("k", "v", "q")),
        readouts.weight,
        readouts.bias,
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y, W1, W2 = _Run.apply(layout, reference, *tensors)
    else:
        y, W1, W2 = _forward(layout, *tensors, keep=None)
    return y, {"W1": W1, "W2": W2}


def _memory_first(W: Tensor) -> Tensor:
    """[B, N, H, ...] -> [N, B·H, ...], a copy."""
    return W.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _batch_first(W: Tensor, batch: int) -> Tensor:
    """The inverse."""
    return W.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


def _per_row(t: Tensor, batch: int) -> Tensor:
    """[N, H, ...] -> [N, B·H, ...], a copy for each row of the batch."""
    return t.unsqueeze(1).expand(-1, batch, *t.shape[1:]).flatten(1, 2)


def _chunk_inputs(
    layout: Layout, paths: tuple[Tensor, Tensor, Tensor], start: int, readout: Tensor
) -> ChunkInputs:
    """Of the chunk that begins at column `start`; paths k, v, q [B, H, T, d]."""
    k, v, q = (p[:, :, start : start + layout.chunk_size] for p in paths)
    x = torch.stack([k, v, *([q] if layout.adaptive_q else []), k, k]).flatten(1, 2)
    return ChunkInputs(x, None if layout.adaptive_q else q.flatten(0, 1), readout)


def _forward(
    layout: Layout,
    W1: Tensor,
    W2: Tensor,
    W2_init: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All chunks forward; what the backward pass needs goes into `keep`."""
    B, H, T, d = k.shape
    W = Memories(_memory_first(W1), _memory_first(W2), _per_row(W2_init, B))
    readout, bias = _per_row(weight, B).unsqueeze(-1), _per_row(bias, B).unsqueeze(-1)
    y = torch.empty_like(q)
    for start in range(0, T, layout.chunk_size):
        inputs = _chunk_inputs(layout, (k, v, q), start, readout)
        made = generate(layout, W, inputs.x, readout, bias)
        decay = decays(made.log_alpha)
        key, value = made.vectors[0], made.vectors[1]
        query = inputs.q if inputs.q is not None else made.vectors[2]
        kept, u, a = write(W, key, value, made.eta, decay)
        out = read(W, query, key, u[-1], a[-1], kept.B[-1], decay)
        y[:, :, start : start + layout.chunk_size] = (query + out.out).unflatten(0, (B, H))
        if keep is not None:
            keep.extend((W.W1, W.W2, *made, *kept, *out))
        W = finish(W, key, u, a, kept.B, decay)
    if keep is not None:
        keep.extend((W.W1, W.W2))
    return y, _batch_first(W.W1, B), _batch_first(W.W2, B)


_KEPT = tuple(map(len, (("W1", "W2"), Generated._fields, Written._fields, Read._fields)))


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, reference: Reference, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep: list[Tensor] = []
        outputs = _forward(layout, *tensors, keep=keep)
        ctx.layout, ctx.reference = layout, reference
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(*tensors, *keep)
        return outputs

    @staticmethod
    def backward(ctx: Any, gy: Tensor, g_W1: Tensor, g_W2: Tensor) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(ctx.reference, tensors, (gy, g_W1, g_W2))
        return None, None, *_backward(ctx.layout, tensors, kept, gy, g_W1, g_W2)


def _differentiable_backward(
    reference: Reference, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients from the generic step, as a graph that can be differentiated again."""
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(
        reference(*tensors), wanted, grads, create_graph=True, allow_unused=True, materialize_grads=True
    )
    by_id = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return tuple(by_id.get(id(t)) for t in tensors)


def _backward(
    layout: Layout,
    tensors: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    gy: Tensor,
    g_W1: Tensor,
    g_W2: Tensor,
) -> tuple[Tensor, ...]:
    """All chunks backward, the last first; gradients in the order of the inputs."""
    _, _, W2_init, k, v, q, weight, bias = tensors
    B, H, T, _ = k.shape
    W2_init = _per_row(W2_init, B)
    readout = _per_row(weight, B).unsqueeze(-1)
    gW = Memories(_memory_first(g_W1), _memory_first(g_W2), torch.zeros_like(W2_init))
    g_paths = [torch.empty_like(p) for p in (k, v, q)]
    g_weight, g_bias = torch.zeros_like(readout), torch.zeros_like(readout[..., 0, 0])
    size = sum(_KEPT)
    after = Memories(*kept[-2:], W2_init)
    for i in reversed(range(T // layout.chunk_size)):
        W1, W2, *rest = kept[i * size : (i + 1) * size]
        W = Memories(W1, W2, W2_init)
        parts = iter(rest)
        saved = tuple(kind(*(next(parts) for _ in kind._fields)) for kind in (Generated, Written, Read))
        columns = slice(i * layout.chunk_size, (i + 1) * layout.chunk_size)
        inputs = _chunk_inputs(layout, (k, v, q), columns.start, readout)
        g = backward_chunk(layout, W, after, inputs, saved, gW, gy[:, :, columns].flatten(0, 1))
        after = W
        g_weight += g.readout
        g_bias += g.logits.sum(-1)
        g_q = g.q if g.q is not None else g.x[2]
        for path, value in zip(g_paths, (g.x[0] + g.x[-2] + g.x[-1], g.x[1], g_q), strict=True):
            path[:, :, columns] = value.unflatten(0, (B, H))
    over_batch = [t.unflatten(1, (B, H)).sum(1) for t in (gW.W2_init, g_weight.squeeze(-1), g_bias)]
    return _batch_first(gW.W1, B), _batch_first(gW.W2, B), over_batch[0], *g_paths, *over_batch[1:]
