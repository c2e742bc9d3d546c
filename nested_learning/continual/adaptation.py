"""Training the base model while its levels learn: the outer gradient through text read in context.

Every text is read as `Learner.observe` reads it, from empty deltas: segment by segment, levels writing at
their boundaries. The outer loss is the mean next-token loss of all pairs, each scored before it is learned
from; its gradient reaches the base weights at W_base + Σ Δ with Δ held fixed (first order), so one backward
pass per segment serves the levels and the base model alike, and the memory is that of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row, Slots
from nested_learning.continual.learner import Learner
from nested_learning.continual.reader import Pairs, Reader, ReadingPlan
from nested_learning.continual.writing import LevelWriter, learn_from


class OuterReader(Reader):
    """A reader that also adds `scale` times the gradient of every loss to the base parameters' `.grad`."""

    def __init__(self, model: Any, writers: Sequence[LevelWriter], plan: ReadingPlan) -> None:
        super().__init__(model, writers, plan)
        self.base = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.scale = 1.0

    def learn(self, tokens: Tensor, mask: Tensor, context: Context, leaves: Slots) -> tuple[Pairs, Context]:
        if not bool(mask.all()):
            raise ValueError(
                "the outer loss is that of all tokens: read them with a mask that is True for all"
            )
        # While deltas are installed, W_base + Σ Δ goes by the name of W_base.
        installed = dict(self.model.named_parameters())
        outer = {name: installed[name].requires_grad_() for name in self.base}
        wanted = [*leaves.values(), *outer.values()]
        with torch.enable_grad():
            losses, context = self.losses(tokens, context)
            if not len(losses):
                return Pairs(losses, mask[1:], {}), context
            found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        for name, g in zip(outer, found[len(leaves) :], strict=True):
            if g is not None:
                self._accumulate(self.base[name], g)
        inner = zip(leaves, found[: len(leaves)], strict=True)
        return Pairs(losses.detach(), mask[1:], {key: g for key, g in inner if g is not None}), context

    def _accumulate(self, parameter: Tensor, g: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = g * self.scale
        else:
            parameter.grad.add_(g, alpha=self.scale)


class Adapter:
    """Loss and gradient of whole texts, read with the levels of a learner.

    Args:
        learner: gives the base model, the levels and the way of reading; its own memory is not used.
    """

    def __init__(self, learner: Learner) -> None:
        reader = learner.reader
        self._inner = reader
        self._outer = OuterReader(reader.model, reader.writers, reader.plan)

    def backward(self, ids: Tensor) -> Tensor:
        """Add the gradient of the mean loss of ids [B, T] to the base parameters' `.grad`.

        Returns:
            the mean loss, 0-D, without graph.
        """
        self._outer.scale = 1 / (len(ids) * (ids.shape[1] - 1))
        return torch.stack([self._read(self._outer, row) for row in ids]).mean()

    def loss(self, ids: Tensor) -> Tensor:
        """The mean loss of ids [B, T], levels learning as they read; no outer gradient."""
        return torch.stack([self._read(self._inner, row) for row in ids]).mean()

    def _read(self, reader: Reader, ids: Tensor) -> Tensor:
        """Mean loss of the pairs of ids [T], read from empty deltas."""
        row = Row.new(len(reader.writers), ids.device)
        losses = []
        while len(ids):
            end = reader.plan.segments.end(row.position)
            piece, ids = ids[: end - row.position], ids[end - row.position :]
            read, segment = reader.read_segment(row, piece, torch.ones(len(piece), dtype=torch.bool))
            losses.append(read)
            if row.position == end:  # the text may end before the segment does
                learn_from(reader.writers, row, segment, 0)
        return torch.cat(losses)[1:].mean()
