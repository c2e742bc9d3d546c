"""A learner from the definition alone: a copy of the model whose real parameters are overwritten.

One loop over segments. The gradient of each pair's loss comes from `backward()`; the context is
transformers' own cache. Every level keeps a plain dict of deltas; nothing is shared, nothing is clever.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache


class Oracle:
    """Args: the model, and per level (chunk_size, lr, names of its weights, clip, make_optimizer or None).

    With `make_optimizer`, the inner rule is a torch optimizer on a parameter that stands for the delta.
    """

    def __init__(self, model, levels, window=10**9, overlap=1):
        self.base = model
        self.model = copy.deepcopy(model).eval()
        self.levels = levels
        parameters = dict(model.named_parameters())
        self.deltas = [{n: torch.zeros_like(parameters[n]) for n in names} for _, _, names, *_ in levels]
        self.sums = [{n: torch.zeros_like(parameters[n]) for n in names} for _, _, names, *_ in levels]
        self.optimizers = [
            make(list(self.deltas[i].values())) if make else None for i, (*_, make) in enumerate(levels)
        ]
        self.window, self.overlap = window, overlap

    def _set_weights(self):
        with torch.no_grad():
            for name, base in self.base.named_parameters():
                total = base.detach().clone()
                for deltas in self.deltas:
                    if name in deltas:
                        total += deltas[name]
                self.model.get_parameter(name).copy_(total)

    def _read(self, ids, targets, cache, weights=1.0):
        """Losses of `targets` given the cache and `ids`, their gradient; the cache grows by `ids`."""
        if not len(ids):
            return torch.empty(0, dtype=torch.float64), {}
        self.model.zero_grad()
        logits = self.model(ids[None], past_key_values=cache, use_cache=True).logits[0]
        losses = cross_entropy(logits, targets, reduction="none")
        (losses * weights).sum().backward()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return losses.detach(), {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }

    def observe(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Surprise per token; self.deltas and self.sums end where the text ends (at a segment's end).

        With `weights` [T], the levels learn the weighted sum of the losses.
        """
        surprise = torch.full((len(ids),), math.nan, dtype=torch.float64)
        cache, begin_of_window = DynamicCache(), 0
        weights = torch.ones(len(ids), dtype=torch.float64) if weights is None else weights
        sizes = [size for size, *_ in self.levels]
        ends = [t for t in range(1, len(ids) + 1) if any(t % size == 0 for size in sizes)]
        start = 0
        for end in ends:
            self._set_weights()
            if end - begin_of_window > self.window:
                begin_of_window, cache = start - self.overlap, DynamicCache()
                self._read(ids[begin_of_window : start - 1], ids[begin_of_window + 1 : start], cache)
            if start:
                surprise[start : start + 1], crossing = self._read(
                    ids[start - 1 : start], ids[start : start + 1], cache, weights[start : start + 1]
                )
            losses, inside = self._read(
                ids[start : end - 1], ids[start + 1 : end], cache, weights[start + 1 : end]
            )
            surprise[start + 1 : end] = losses
            for i, size in enumerate(sizes):
                for name, total in self.sums[i].items():
                    if inside:
                        total += inside[name]
                    if start % size:  # the pair lies within this level's chunk
                        total += crossing[name]
                if end % size == 0:
                    self._write(i)
            start = end
        return surprise

    def _write(self, i):
        _, lr, _, clip, _ = self.levels[i]
        norm = torch.sqrt(sum(g.square().sum() for g in self.sums[i].values()))
        if float(norm) == 0.0:  # no token of the chunk was to be learned
            return
        scale = 1.0 if clip is None else min(1.0, clip / float(norm))
        if self.optimizers[i] is not None:
            for name, delta in self.deltas[i].items():
                delta.grad = self.sums[i][name] * scale
            self.optimizers[i].step()
        else:
            for name, delta in self.deltas[i].items():
                delta -= lr * scale * self.sums[i][name]
        for total in self.sums[i].values():
            total.zero_()
