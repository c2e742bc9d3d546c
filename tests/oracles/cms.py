"""A continuum memory system that learns in context by regression, as a loop over tokens, for one sequence.

Written from equations 70-74 and the docstrings alone; nothing of the library runs in it. Gradients come from
autograd, a chunk's sum from a Python list of its tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def branch(W: dict[str, Tensor], gain: Tensor, u: Tensor, activation: str, heads: Tensor | None) -> Tensor:
    return answer(W, gain * u / torch.sqrt(u.square().mean() + 1e-6), activation, heads)


def answer(W, k, activation, heads):
    """f(W; k) at a normalised input."""
    return W["down.weight"] @ hidden(W, k, activation, heads)


def hidden(W, k, activation, heads):
    a = W["up.weight"] @ k
    if activation == "swiglu":
        phi = F.silu(W["gate.weight"] @ k) * a
    else:
        phi = F.gelu(a) if activation == "gelu" else F.relu(a) ** 2
    return phi if heads is None else phi * heads.repeat_interleave(len(phi) // len(heads))


class Rule:
    """From the gradient of a chunk to a direction, per matrix."""

    def __init__(self, name: str) -> None:
        self.name, self.n, self.m, self.v = name, 0, 0.0, 0.0

    def __call__(self, g: Tensor) -> Tensor:
        self.n += 1
        if self.name == "momentum":
            self.m = 0.9 * self.m + g
            return self.m
        if self.name == "adam":
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
            return self.m / (1 - 0.9**self.n) / (torch.sqrt(self.v / (1 - 0.999**self.n)) + 1e-8)
        return g


def write(W, init, grads, rules, level, lr, exempt=()):
    """Equation 71 at one boundary."""
    clipped = [g for name, g in grads.items() if name not in exempt]
    norm = math.sqrt(sum(float(g.detach().square().sum()) for g in clipped))
    limit = 1.0 if level.clip is None else level.clip
    # The norm above is a number: its derivative is taken below only where it matters.
    factor = 1.0 if norm <= limit else limit / torch.sqrt(sum(g.square().sum() for g in clipped))
    kept = 1.0 if level.retention is None else level.retention
    new = {}
    for name, value in W.items():
        step = grads[name] if name in exempt else lr * rules[name](factor * grads[name])
        new[name] = init[name] + kept * (value - init[name]) - step
    return new


class OneLevel:
    def __init__(self, cms, index: int) -> None:
        self.cms, self.index, self.level = cms, index, cms.levels[index]
        block = cms.blocks[index]
        self.activation, self.gain = block.activation, block.norm.weight
        self.own = {n: p for n, p in block.named_parameters() if n != "norm.weight"}
        self.heads = cms.head_weights[index] if cms.variant == "independent" else None
        self.W, self.init, self.tokens = self.own, self.own, []
        self.rules = self.fresh_rules(self.level)
        self.nested = cms.variant == "nested" and index + 1 < len(cms.levels)
        if self.nested:
            self.slower = cms.levels[index + 1]
            self.initial_rules, self.initial_sum = self.fresh_rules(self.slower), None
            self.chunk_losses = []  # of the unfinished chunk of the slower level
        self.writes = []  # the counts of tokens at which the weights changed

    def fresh_rules(self, level):
        return {name: Rule(level.rule or "gd") for name in self.own}

    @staticmethod
    def lr(cms, index):
        writer = cms.writers[index]
        return cms.levels[index].lr if writer.log_lr is None else torch.exp(writer.log_lr)

    def key_value(self, u):
        projection = self.cms.projections[str(self.index)]
        k, v = projection.key.weight @ u, projection.value.weight @ u
        return self.gain * k / torch.sqrt(k.square().mean() + 1e-6), v / torch.sqrt(v.square().mean() + 1e-6)

    def token(self, u, count, learn):
        """The branch at u, then learning at the end of a chunk."""
        y = branch(self.W, self.gain, u, self.activation, self.heads)
        self.tokens.append((u, learn))
        if count % self.level.chunk_size == 0:
            self.boundary(count)
        return y

    def boundary(self, count):
        at = {n: w.clone() for n, w in self.W.items()}
        losses = []
        for u, learn in self.tokens:
            k, v = self.key_value(u)
            if learn:
                losses.append((answer(at, k, self.activation, self.heads) - v).square().sum() / (2 * len(v)))
        grads = {n: torch.zeros_like(w) for n, w in at.items()}
        if losses:
            found = torch.autograd.grad(sum(losses), list(at.values()), create_graph=True)
            grads = dict(zip(at, found, strict=True))
        lr, exempt = self.lr(self.cms, self.index), ()
        if self.level.rule == "dgd":
            grads["down.weight"], exempt = self.delta_rule(at, lr), ("down.weight",)
        self.W = write(self.W, self.init, grads, self.rules, self.level, lr, exempt)
        self.tokens = []
        self.writes.append(count)
        if self.nested:
            old = self.initial_sum or dict.fromkeys(grads, 0)
            self.initial_sum = {n: old[n] + g for n, g in grads.items()}
            self.chunk_losses += losses
            if count % self.slower.chunk_size == 0:
                rate = self.lr(self.cms, self.index + 1)
                if self.cms.nested_gradient == "exact" and self.chunk_losses:
                    names = list(self.init)
                    through = torch.autograd.grad(
                        sum(self.chunk_losses), [self.init[n] for n in names], create_graph=True
                    )
                    self.initial_sum = dict(zip(names, through, strict=True))
                self.chunk_losses = []
                self.init = write(
                    self.init, self.own, self.initial_sum, self.initial_rules, self.slower, rate
                )
                self.W, self.rules, self.initial_sum = self.init, self.fresh_rules(self.level), None

    def delta_rule(self, at, lr):
        W = at["down.weight"]
        for u, learn in self.tokens:
            k, v = self.key_value(u)
            phi = hidden(at, k, self.activation, self.heads)
            eta = lr / (1 + lr * phi @ phi)
            if learn:
                W = W - eta * torch.outer(W @ phi, phi) + eta * torch.outer(v, phi)
        return at["down.weight"] - W


def run(cms, x: Tensor, learn: list[bool] | None = None) -> tuple[Tensor, list[OneLevel]]:
    """y [T, D] for x [T, D], all tokens real, and the levels after it."""
    levels = [OneLevel(cms, index) for index in range(len(cms.levels))]
    outputs = []
    for t, u in enumerate(x):
        y = u
        for level in levels:
            y = y + level.token(u if cms.variant == "independent" else y, t + 1, learn is None or learn[t])
        outputs.append(y)
    return torch.stack(outputs), levels
