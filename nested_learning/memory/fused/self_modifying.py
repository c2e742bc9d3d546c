"""Self-modifying Titans by the arithmetic of self_modifying_chunk.py: chunk after chunk, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.architecture import ResidualMLP
from nested_learning.memory.fused.function import Generic, chunks_of
from nested_learning.memory.fused.scratch import Scratch
from nested_learning.memory.fused.self_modifying_backward import ChunkInputs, backward_chunk
from nested_learning.memory.fused.self_modifying_chunk import (
    Generated,
    Layout,
    Memories,
    Read,
    Written,
    finish,
    generate,
    read,
    write,
)
from nested_learning.memory.objective import L2
from nested_learning.memory.retention import Retention
from nested_learning.memory.running import Inputs as StepInputs
from nested_learning.memory.running import Readouts
from nested_learning.memory.system import MemorySystem, learning_rule

if TYPE_CHECKING:
    from nested_learning.memory.running import MemoryState as RunningWeights

_GENERATED = (("k", "v", "eta", "alpha"), ("k", "v", "q", "eta", "alpha"))
_RULE = learning_rule(ResidualMLP(), L2(), "dgd")


def covers(system: MemorySystem) -> bool:
    """Whether this is the system that the arithmetic is for."""
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
    )


class _Inputs(NamedTuple):
    """The tensors that a run is a function of."""

    W1: Tensor  # [B, N, H, d, e]
    W2: Tensor  # [B, N, H, e, d]
    W2_init: Tensor  # [N, H, e, d]
    k: Tensor  # [B, H, T, d], and v and q
    v: Tensor
    q: Tensor
    weight: Tensor  # [2, H, d] of the readouts
    bias: Tensor  # [2, H]


class _Saved(NamedTuple):
    """What the backward pass needs of one chunk."""

    W1: Tensor  # [N, M, d, e] before the chunk
    W2: Tensor  # [N, M, e, d]
    made: Generated
    kept: Written
    out: Read


def prepare(
    system: MemorySystem,
    initial: Mapping[str, Tensor],
    weights: RunningWeights,
    inputs: StepInputs,
    readouts: Readouts,
    want_surprise: bool,
    generic: Generic,
    operands: torch.dtype | None,
) -> tuple[SelfModifying, _Inputs]:
    """The kernel of a run and its tensors."""
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
    return SelfModifying(layout, want_surprise, generic, operands), tensors


@dataclass(frozen=True)
class SelfModifying:
    """See `function.Kernel`; outputs y, W1, W2 and the surprise."""

    layout: Layout
    want_surprise: bool
    generic: Generic
    operands: torch.dtype | None  # see `Scratch`

    def forward(
        self, tensors: Sequence[Tensor], saved: list[_Saved] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        given = _Inputs._make(tensors)
        return _forward(self.layout, given, self.want_surprise, saved, Scratch(given.W1, self.operands))

    def backward(
        self,
        tensors: Sequence[Tensor],
        after: Sequence[Tensor],
        saved: Sequence[_Saved],
        gy: Tensor,
        g_after: Sequence[Tensor],
    ) -> _Inputs:
        given = _Inputs._make(tensors)
        W2_init = _per_row(given.W2_init, given.k.shape[0])
        W1, W2 = (_memory_first(W) for W in after)
        g_W1, g_W2 = (_memory_first(g) for g in g_after)
        gW = Memories(g_W1, g_W2, torch.zeros_like(W2_init))
        ws = Scratch(given.W1, self.operands)
        return _backward(self.layout, given, Memories(W1, W2, W2_init), saved, gy, gW, ws)

    def reference(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        given = _Inputs._make(tensors)
        y, after, _ = self.generic(
            {"W1": given.W1[0], "W2": given.W2_init},  # of W1's initial value nothing is used but its shape
            {"W1": given.W1, "W2": given.W2},
            None,
            StepInputs({"k": given.k, "v": given.v, "q": given.q}, None, Readouts(given.weight, given.bias)),
            None,
        )
        return y, after["W1"], after["W2"]


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


def _forward(
    layout: Layout, given: _Inputs, want_surprise: bool, saved: list[_Saved] | None, ws: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All chunks forward: y, W1, W2 and the surprise; what the backward pass needs goes into `saved`."""
    B, H, T, _ = given.k.shape
    W = Memories(_memory_first(given.W1), _memory_first(given.W2), _per_row(given.W2_init, B))
    readout, bias = _per_row(given.weight, B).unsqueeze(-2), _per_row(given.bias, B).unsqueeze(-1)
    y = torch.empty_like(given.q)
    surprise = y.new_empty(B, T) if want_surprise else None
    for columns in chunks_of(layout.chunk_size, T):
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
    layout: Layout,
    given: _Inputs,
    after: Memories,
    saved: Sequence[_Saved],
    gy: Tensor,
    gW: Memories,
    ws: Scratch,
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
    for columns, chunk in reversed(list(zip(chunks_of(layout.chunk_size, T), saved, strict=True))):
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
