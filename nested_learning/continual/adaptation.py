"""Training the base model while its levels learn: the outer gradient through text read in context.

Every text is read as `Learner.observe` reads it, from empty deltas: segment by segment, levels writing at
their boundaries. The outer loss is the mean next-token loss of all pairs, each scored before it is learned
from; its gradient reaches the base weights at W_base + Σ Δ with Δ held fixed (first order), so one backward
pass per segment serves the levels and the base model alike, and the memory is that of one segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.continual.context import Context
from nested_learning.continual.deltas import Row
from nested_learning.continual.learner import Learner
from nested_learning.continual.objectives.answers import KeptAnswers
from nested_learning.continual.reader import Reader
from nested_learning.continual.study import study
from nested_learning.memory.state import Weights


class OuterReader(Reader):
    """A reader that also adds `scale` times the gradient of every loss to the base parameters' `.grad`."""

    def __init__(self, inner: Reader) -> None:
        super().__init__(inner.model, inner.writers, inner.plan, inner.anchors)
        with self.workspace.bare():
            self.base = {name: p for name, p in inner.model.named_parameters() if p.requires_grad}
        self.scale = 1.0

    def read_pairs(
        self,
        tokens: Tensor,
        learn: Tensor,
        context: Context,
        leaves: Weights,
        answers: list[KeptAnswers] | None = None,
    ) -> tuple[Tensor, Context, Weights]:
        # While deltas are installed, W_base + Σ Δ goes by the name of W_base: a full delta's leaf is that
        # very tensor, so that both gradients are one.
        installed = dict(self.model.named_parameters())
        outer = {name: installed[name].requires_grad_() for name in self.base}
        losses, context, grads = super().read_pairs(tokens, learn, context, {**outer, **leaves}, answers)
        for name in outer.keys() & grads.keys():
            self._accumulate(self.base[name], grads[name])
        return losses, context, {key: grads[key] for key in leaves if key in grads}

    def _accumulate(self, parameter: Tensor, g: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = g * self.scale
        else:
            parameter.grad.add_(g, alpha=self.scale)


class Adapter:
    """Loss and gradient of whole texts, read with the levels of a learner.

    Args:
        learner: the learner whose base model, levels and way of reading are used; its memory is not.
    """

    def __init__(self, learner: Learner) -> None:
        reader = learner.reader
        self._inner = reader
        self._outer = OuterReader(reader)

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
        """Mean loss of the pairs of ids [T], read from where the levels begin."""
        row = Row.new((writer.new_state() for writer in reader.writers), ids.device)
        learn = torch.ones(len(ids), dtype=torch.bool, device="cpu")
        losses = []
        for piece, ends in reader.plan.pieces(0, len(ids)):
            if ends:
                found, _ = study(reader, row, ids[piece], learn[piece], 0)
            else:  # the text ends before the segment does
                found, _ = reader.read_segment(row, ids[piece], learn[piece])
            losses.append(found)
        return torch.cat(losses)[1:].mean()
