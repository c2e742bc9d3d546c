"""A learner with re-reading, distillation and anchors from their definitions alone, in one loop.

Weights are put into the model by `torch.func.functional_call`, base + Σ Δ with Δ full or up · down, so that
autograd gives the gradient of every level's own matrices; the context is transformers' own cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.func import functional_call
from transformers import DynamicCache


@dataclass
class OracleLevel:
    """Settings and matrices of one level: `factors` by weight name is [delta] or [down, up]."""

    size: int
    lr: float
    factors: dict[str, list[torch.Tensor]]
    clip: float | None = 1.0
    reread: int = 0
    distill: float = 0.0
    anchor: float = 0.0
    decay: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: list[torch.Tensor] | None = None
    distilled: list[torch.Tensor] | None = None
    pairs: int = 0

    def leaves(self):
        return [t for factors in self.factors.values() for t in factors]

    def delta(self, name):
        factors = self.factors[name]
        return factors[0] if len(factors) == 1 else factors[1] @ factors[0]

    def step(self, grads):
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        scale = 1.0 if self.clip is None else min(1.0, self.clip / float(norm))
        for leaf, g in zip(self.leaves(), grads, strict=True):
            leaf.data -= self.lr * scale * g


def added(first, second, weight=1.0):
    if first is None:
        return [weight * g for g in second]
    return [a + weight * b for a, b in zip(first, second, strict=True)]


@dataclass
class ObjectivesOracle:
    model: object
    levels: list[OracleLevel]
    segment: int
    window: int
    overlap: int
    top_k: int = 64
    background: list[torch.Tensor] = field(default_factory=list)  # whole texts
    losses_read_again: list[float] = field(default_factory=list)

    def logits(self, ids, cache, base=False):
        """Logits [n, V] of ids in the cache's context; the cache grows, cut from the graph."""
        if not len(ids):
            return torch.zeros(0, self.model.config.vocab_size, dtype=torch.float64)
        weights = {}
        for level in () if base else self.levels:
            for name in level.factors:
                before = weights.get(name, self.model.get_parameter(name).detach())
                weights[name] = before + level.delta(name)
        output = functional_call(
            self.model, weights, (ids[None],), {"past_key_values": cache, "use_cache": True}
        )
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return output.logits[0]

    def grads(self, total):
        """Gradient for each level's matrices."""
        leaves = [leaf for level in self.levels for leaf in level.leaves()]
        if not total.requires_grad:
            return [[torch.zeros_like(leaf) for leaf in level.leaves()] for level in self.levels]
        found = iter(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        return [[next(found) for _ in level.leaves()] for level in self.levels]

    def new_cache(self, ids):
        cache = DynamicCache()
        if len(ids):
            self.logits(ids, cache)
        return cache

    def ends(self, length):
        """Ends of segments, the first one after `length` included."""
        found, t, fast = [], 0, self.levels[0].size
        while not found or found[-1] <= length:
            t += 1
            if t % fast % self.segment == 0 or any(t % level.size == 0 for level in self.levels):
                found.append(t)
        return found

    def observe(self, ids, learn=None):
        learn = torch.ones(len(ids), dtype=torch.bool) if learn is None else learn
        for level in self.levels:
            for leaf in level.leaves():
                leaf.requires_grad_()
        surprise = torch.full((len(ids),), math.nan, dtype=torch.float64)
        ends, start, begin, cache, teacher = self.ends(len(ids)), 0, 0, DynamicCache(), {}
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if end > len(ids):
                break
            if end - begin > self.window:
                begin, teacher = start - self.overlap, {}
                cache = self.new_cache(ids[begin : start - 1])
            crossing = None
            if start:
                log_p = self.logits(ids[start - 1 : start], cache).log_softmax(-1)
                surprise[start] = -log_p[0, ids[start]].detach()
                crossing = self.grads(-log_p[0, ids[start]])
                teacher[start] = log_p[0].detach()
            log_p = self.logits(ids[start : end - 1], cache).log_softmax(-1)
            losses = -log_p.gather(1, ids[start + 1 : end, None])[:, 0]
            surprise[start + 1 : end] = losses.detach()
            inside = self.grads((losses * learn[start + 1 : end]).sum())
            teacher.update({t: log_p[t - start - 1].detach() for t in range(start + 1, end)})
            if start - begin < self.window // 2:
                teacher = {}
            if following - begin > self.window:
                self.distil(ids, learn, teacher)
            anchors = [self.anchor(level, end // level.size) for level in self.levels]
            for i, level in enumerate(self.levels):
                level.sums = added(level.sums, inside[i])
                level.pairs += int(learn[start + 1 : end].sum())
                if start % level.size and learn[start]:
                    level.sums = added(level.sums, crossing[i])
                    level.pairs += 1
            for level, anchor in zip(self.levels, anchors, strict=True):
                if end % level.size == 0:
                    self.write(level, anchor)
            for i, level in enumerate(self.levels):
                if end % level.size == 0 and learn[end - level.size + 1 : end].any():
                    for _ in range(level.reread):
                        self.reread(i, level, ids, learn, end)
            start = end
        return surprise

    def write(self, level, anchor):
        sums, level.sums = level.sums, None
        if level.distilled is not None:
            sums, level.distilled = added(sums, level.distilled), None
        elif not level.pairs:
            return
        level.pairs = 0
        for name, share in level.decay.items():
            level.factors[name][-1].data *= 1 - share
        level.step(sums if anchor is None else added(sums, anchor))

    def passes(self, ids, context_from, first, last):
        """Read ids first … last − 1 in passes, given those from `context_from`: (a, b, logits) of each."""
        begin, cache = context_from, self.new_cache(ids[context_from:first])
        a = first
        while a < last:
            b = min(a + self.segment, last)
            if b - begin > self.window:
                begin = max(a - self.overlap, context_from)
                cache = self.new_cache(ids[begin:a])
            yield a, b, self.logits(ids[a:b], cache)
            a = b

    def reread(self, i, level, ids, learn, end):
        total, grads, start = 0.0, None, end - level.size
        for a, b, logits in self.passes(ids, max(start - self.overlap, 0), start, end - 1):
            losses = torch.nn.functional.cross_entropy(logits, ids[a + 1 : b + 1], reduction="none")
            loss = losses[learn[a + 1 : b + 1]].sum()
            total += float(loss.detach())
            grads = added(grads, self.grads(loss)[i])
        self.losses_read_again.append(total / int(learn[start + 1 : end].sum()))
        level.step(grads)

    def distil(self, ids, learn, teacher):
        """KL over the k likeliest tokens of the teacher and all others as one outcome."""
        if not any(level.distill for level in self.levels) or not teacher:
            return
        first, last = min(teacher) - 1, max(teacher)
        for a, b, logits in self.passes(ids, first + 1 - self.overlap, first, last):
            total = torch.zeros((), dtype=torch.float64)
            for t in range(a + 1, b + 1):
                if not learn[t]:
                    continue
                p, q = teacher[t].exp(), logits[t - a - 1].softmax(-1)
                order = p.argsort(descending=True)
                top, others = order[: self.top_k], order[self.top_k :]
                total = total + (p[top] * (p[top] / q[top]).log()).sum()
                total = total + p[others].sum() * (p[others].sum() / q[others].sum()).log()
            for level, grads in zip(self.levels, self.grads(total), strict=True):
                if level.distill:
                    level.distilled = added(level.distilled, grads, level.distill)

    def anchor(self, level, number):
        """Gradient of the KL to the base model on the piece of background of the level's write `number`."""
        if not level.anchor:
            return None
        length = min(level.size, self.window)
        pieces = [text[i : i + length] for text in self.background for i in range(0, len(text), length)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        piece, total = pieces[(number - 1) % len(pieces)], None
        base = self.logits(piece, DynamicCache(), base=True).softmax(-1).detach()
        for a, b, logits in self.passes(piece, 0, 0, len(piece) - 1):
            divergence = (base[a:b] * (base[a:b].log() - logits.log_softmax(-1))).sum()
            total = added(total, self.grads(divergence)[self.levels.index(level)], level.anchor)
        return total
