"""Solve with a unit lower triangular matrix by matrix products.

Library solvers take a batch of small triangles one by one, which costs as much as ten products of the same
size. The inverse by blocks is a handful of batched products; the backward pass reuses it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.context import forward_mode

# Within a block the inverse is the Neumann series, finite for a nilpotent matrix. Its terms grow with the
# block while the inverse does not: for keys that are nearly one and rates of 2 they reach 10⁶ in a block of
# 16, which leaves float32 no digit. Blocks of 4 lose none, and merging them is as stable as substitution.
_BLOCK = 4
_MASKED = 16  # up to here blocks are merged within one matrix, which takes fewer calls than to cut it up


def solve_unit_lower(L: Tensor, R: Tensor) -> Tensor:
    """(I + L)⁻¹ R for strictly lower triangular L.

    Args:
        L: [..., C, C], zero on and above the diagonal (not checked).
        R: [..., C, d]; leading dimensions broadcast.
    """
    batch = torch.broadcast_shapes(L.shape[:-2], R.shape[:-2])
    L, R = L.expand(batch + L.shape[-2:]), R.expand(batch + R.shape[-2:])
    if forward_mode() or isinstance(L.shape[-1], torch.SymInt):  # blocks need to know the size
        return torch.linalg.solve_triangular(L, R, upper=False, unitriangular=True)
    return _SolveUnitLower.apply(L, R)[0]


def inverse_unit_lower(L: Tensor) -> Tensor:
    """(I + L)⁻¹ [..., C, C] for strictly lower triangular L [..., C, C]."""
    C = L.shape[-1]
    if C <= _MASKED:
        return _inverse_of_few(L)
    size = 1 << (C - 1).bit_length()
    if size != C:  # the two halves must be of one size; the identity below L stays by itself
        return inverse_unit_lower(F.pad(L, (0, size - C, 0, size - C)))[..., :C, :C]
    half = C // 2
    blocks = inverse_unit_lower(torch.stack([L[..., :half, :half], L[..., half:, half:]]))
    X = torch.zeros_like(L)
    X[..., :half, :half], X[..., half:, half:] = blocks[0], blocks[1]
    X[..., half:, :half] = -(blocks[1] @ (L[..., half:, :half] @ blocks[0]))
    return X


def _inverse_of_few(L: Tensor) -> Tensor:
    """(I + L)⁻¹ by whole products: of the blocks on the diagonal, then of ever larger ones."""
    at = torch.arange(L.shape[-1], device=L.device)
    apart = at.unsqueeze(-1) ^ at  # below n where both are in one block of n, a power of two
    size = _BLOCK
    block = L * (apart < size)
    X = torch.eye(len(at), dtype=L.dtype, device=L.device) - block
    X = X + X @ (block @ block)  # I − D + D² − D³
    while size < len(at):
        size *= 2
        wider = L * (apart < size) if size < len(at) else L
        X = X - X @ ((wider - block) @ X)  # X₂₁ = −X₂₂ L₂₁ X₁₁
        block = wider
    return X


class _SolveUnitLower(torch.autograd.Function):
    """Y = X R with X = (I + L)⁻¹:  ∂R = Xᵀ g,  ∂L = −∂R Yᵀ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        X = inverse_unit_lower(L)
        return X @ R, X

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        L, Y, X = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative must see how X depends on L
            g_R = torch.linalg.solve_triangular(L.mT, g, upper=True, unitriangular=True)
        else:
            g_R = X.mT @ g
        return -(g_R @ Y.mT), g_R
