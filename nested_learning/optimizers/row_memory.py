"""The network inside `DeepMomentumGD`: a residual MLP on rows, m̂(û) = û + f(û), as pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nested_learning.ops.norm import magnitude

RowObjective = Callable[[Tensor, Tensor, Tensor | None], Tensor]

DEFAULT_WIDTH = 64


def init(
    shape: torch.Size, depth: int, width: int | None, rank: int | None, like: Tensor, seed: int
) -> list[Tensor]:
    """f's matrices for gradients of `shape` (out, in), in the order in which they are applied.

    One matrix (p, q) per layer or, with `rank` r, two: (r, q) and (p, r), r no larger than p and q. The last
    matrix is zero, the others N(0, 1/fan_in). They have the dtype and device of `like`.
    """
    out, size = shape
    width = width or max(1, min(DEFAULT_WIDTH, out // 8))
    sizes = [size, *[width] * (depth - 1), size]
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = []
    for q, p in itertools.pairwise(sizes):
        r = None if rank is None else min(rank, p, q)
        for rows, cols in [(p, q)] if r is None else [(r, q), (p, r)]:
            noise = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * cols**-0.5
            weights.append(noise.to(like.device, like.dtype))
    weights[-1].zero_()
    return weights


def read(weights: list[Tensor], rows: Tensor, depth: int, recompute: bool = False) -> Tensor:
    """m̂(û) = û + f(û) for rows [N, in].

    Args:
        weights: the matrices of `init`.
        rows: û.
        depth: layers of f, each of one matrix or two.
        recompute: do not keep the activations for the gradient.
    """
    factors = len(weights) // depth
    if recompute and torch.is_grad_enabled():
        answer: Tensor = checkpoint(_residual, rows, factors, *weights, use_reentrant=False)
        return rows + answer
    return rows + _residual(rows, factors, *weights)


def _residual(rows: Tensor, factors: int, *weights: Tensor) -> Tensor:
    hidden = rows
    for i, weight in enumerate(weights):
        if i > 0 and i % factors == 0:
            hidden = F.silu(hidden)
        hidden = hidden @ weight.mT
    return hidden


def dot(answer: Tensor, value: Tensor, previous: Tensor | None) -> Tensor:
    """−⟨m̂, P̂⟩, a mean over elements."""
    return -(answer * value).mean()


def l2(answer: Tensor, value: Tensor, previous: Tensor | None) -> Tensor:
    """½(m̂ − P̂)², a mean over elements."""
    return 0.5 * (answer - value).square().mean()


def surrogate(answer: Tensor, value: Tensor, previous: Tensor | None) -> Tensor:
    """Direction and size of each row, and steadiness of the mean row from one step to the next.

    Rows whose value is zero (embeddings of tokens that did not occur) count as answered.
    """
    used = (value != 0).any(dim=-1)
    s = magnitude(value, -1)  # rows far smaller than the others count as much
    answers, values = answer / s, value / s
    ratio = torch.where(used, answers.norm(dim=-1) / torch.where(used, values.norm(dim=-1), 1), 1)
    cosine = torch.where(used, F.cosine_similarity(answers, values, dim=-1), 1)
    loss = (1 - cosine).mean() + (ratio - 1).square().mean()
    if previous is not None:
        loss = loss + 1 - F.cosine_similarity(answer.mean(0), previous, dim=-1)
    return loss


OBJECTIVES: dict[str, RowObjective] = {"dot": dot, "l2": l2, "surrogate": surrogate}
