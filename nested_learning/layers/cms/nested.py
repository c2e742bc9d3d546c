"""Variant "nested", exactly: how a level's initial state moves the loss of a whole chunk of the next one.

Within a chunk of level l + 1, level l starts from W_init and writes at every boundary of its own, so all its
weights W_1, W_2, … are functions of W_init (eq 72). To first order, level l + 1 adds up the gradients at the
W_i that were in force; exactly, it takes

    G = ∇_{W_init} Σ_i L_i(W_i(W_init)),   L_i the loss of the i-th chunk of level l,

through every inner write, its clipping, rule and retention. For that the keys and values of the unfinished
slow chunk are kept with the state, and at its boundary the inner level runs over them once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.layers.cms.regression import summed_gradients
from nested_learning.layers.cms.writer import LevelState, LevelWriter
from nested_learning.memory.state import Weights
from nested_learning.ops.context import transformed


def start_context(batch_size: int, length: int, width: int, like: Tensor) -> dict[str, Tensor]:
    """Room for the tokens of a slow chunk: "key" and "value" [B, C, D], "write" [B, C] bool, the learned."""
    empty = like.new_zeros(batch_size, length, width)
    learned = torch.zeros(batch_size, length, dtype=torch.bool, device=like.device)
    return {"key": empty, "value": empty, "write": learned}


def remember(
    context: dict[str, Tensor],
    key: Tensor,
    value: Tensor,
    learn: Tensor | None,
    real: Tensor | None,
    position: Tensor | int,
) -> dict[str, Tensor]:
    """Put the tokens of a segment, which no slow boundary cuts, in their places of the slow chunk.

    Args:
        context: see `start_context`.
        key, value: [B, S, D].
        learn: [B, S] bool, which of them are learned; None: all.
        real: [B, S] bool, which columns hold tokens; None: all.
        position: tokens before the segment, [B] int64 or one number for all rows.
    """
    B, S, _ = key.shape
    length = context["write"].shape[1]
    if learn is None:
        learn = torch.ones(B, S, dtype=torch.bool, device=key.device)
    start = position.view(-1, 1) if isinstance(position, Tensor) else position
    if real is None:
        slots = (start + torch.arange(S, device=key.device).expand(B, S)) % length
    else:  # empty columns go to a slot behind the chunk, which is cut off
        slots = torch.where(real, (start + real.long().cumsum(1) - 1) % length, length)
    new = {"key": key, "value": value, "write": learn}
    return {name: _scattered(old, new[name].to(old.dtype), slots) for name, old in context.items()}


def _scattered(old: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """`old` [B, C, ...] with `new` [B, S, ...] at `slots` [B, S], those below C."""
    shape = (*slots.shape, *[1] * (old.dim() - 2))
    spare = torch.cat([old, torch.zeros_like(old[:, :1])], 1)
    return spare.scatter(1, slots.view(shape).expand_as(new), new)[:, :-1]


def initial_gradients(writer: LevelWriter, activation: str, state: LevelState) -> Weights:
    """G of each matrix [B, out, in]; differentiable in everything that it is made of.

    Args:
        writer: writer of the inner level.
        activation: σ of the block.
        state: state at the end of a slow chunk, with its tokens and the initial state that it began from.
    """

    def loss(initial: Weights) -> Tensor:
        weights, rule = initial, writer.start_rule(initial)
        losses = []
        chunks = (state.context[name].split(writer.level.chunk_size, 1) for name in ("key", "value", "write"))
        for key, value, learn in zip(*chunks, strict=True):
            grads, _, error = summed_gradients(weights, key, value, activation, learn)
            losses.append(0.5 * value.shape[-1] * error.square().sum())  # ‖D · error‖² / 2D
            weights, rule = writer.write(weights, initial, grads, rule, True)
        return torch.stack(losses).sum()

    if transformed() or not torch.is_grad_enabled():
        alone: Weights = torch.func.grad(loss)(state.initial)
        return alone
    # Not torch.func.grad, except within torch.func, which takes nothing else: gradient checkpointing works by
    # hooks on saved tensors, which it refuses.
    leaves = {
        n: W.view_as(W) if W.requires_grad else W.detach().requires_grad_() for n, W in state.initial.items()
    }
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    return dict(zip(leaves, found, strict=True))
