"""Newton-Schulz iterations: products of matrices that push every singular value towards one.

Two iterations, which are not interchangeable:

- `quintic` is Muon's. Its coefficients are chosen for speed at zero and not for convergence: after five
  steps the singular values lie near one, in a band, and stay there.
- `cubic` is eq 44 of "Nested Learning" (arXiv 2512.24695): gradient descent on ½‖O − G‖² + ½‖OᵀO − I‖².
  It does converge, but not to the orthogonal factor of G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.ops.norm import magnitude

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DEFAULT_EPS = 1e-7


def _check_matrix(G: Tensor, steps: int) -> None:
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(
            f"Newton-Schulz works on real matrices [..., m, n], got shape {tuple(G.shape)} of {G.dtype}. "
            "Reshape a vector to one row (1, n), or leave it to another optimizer."
        )
    if steps < 0:
        raise ValueError(f"steps must be a number >= 0, got {steps}")


def _normalised(G: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """G / max(‖G‖_F, eps) of `dtype`, for all sizes of G that its own dtype holds."""
    if not G.shape[-1] * G.shape[-2]:
        return G.to(dtype)
    s = magnitude(G, (-2, -1))
    X = (G / s).to(dtype)
    return X / torch.maximum(X.norm(dim=(-2, -1), keepdim=True), (eps / s).to(dtype))


def quintic(
    G: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    eps: float = DEFAULT_EPS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Muon's orthogonalisation: X ← aX + (bA + cA²)X with A = XXᵀ, from X = G/‖G‖_F.

    The result is U s(Σ) Vᵀ for G = UΣVᵀ. With Muon's coefficients and five steps a singular value of at
    least 0.01 ‖G‖_F ends in [0.65, 1.25]; smaller ones grow by a factor of about 3.44 a step. NS(0) = 0.

    Args:
        G: matrices [..., m, n], float64, float32, bfloat16 or float16.
        steps: iterations.
        coefficients: (a, b, c).
        eps: smallest norm that is divided by.
        dtype: dtype of the iteration and of the result; that of `G` by default (Muon: bfloat16).

    Raises:
        ValueError: `G` is no real matrix, or steps < 0.
    """
    _check_matrix(G, steps)
    a, b, c = coefficients
    tall = G.shape[-2] > G.shape[-1]  # the Gram matrix of the short side is the smaller one
    X = _normalised(G.mT if tall else G, eps, dtype or G.dtype)
    batch = X.shape[:-2]
    X = X.flatten(0, -3) if batch else X
    fused = torch.baddbmm if batch else torch.addmm  # beta · first + alpha · second @ third
    for _ in range(steps):
        A = X @ X.mT
        X = fused(X, fused(A, A, A, beta=b, alpha=c), X, beta=a)  # X ← aX + (bA + cA²)X
    X = X.unflatten(0, batch) if batch else X
    return X.mT if tall else X


def cubic(G: Tensor, steps: int = 50, step_size: float = 0.1, eps: float = DEFAULT_EPS) -> Tensor:
    """Eq 44: O ← O − ζ(O − Ĝ + 2O(OᵀO − I)) from O = Ĝ = G/‖G‖_F, so that no singular value exceeds one.

    A fixed point has the singular vectors of G and, for a singular value s of Ĝ, σ with 2σ³ − σ = s:
    σ ≥ 0.707 where s > 0, and σ = 1 only where s = 1. So this is no orthogonalisation: it flattens the
    spectrum to [0.707, 1]. Directions with s near zero leave zero slowly, by a factor 1 + ζ a step.

    Args:
        G: matrices [..., m, n].
        steps: iterations; ζ = 0.1 needs about 100 for values near zero.
        step_size: ζ; converges for 0 < ζ ≤ 0.2, where no value is thrown over its fixed point.
        eps: smallest norm that is divided by.

    Raises:
        ValueError: `G` is no real matrix, steps < 0, or ζ outside (0, 0.2].
    """
    _check_matrix(G, steps)
    if not 0 < step_size <= 0.2:
        raise ValueError(f"step_size must lie in (0, 0.2], got {step_size}: larger steps overshoot")
    tall = G.shape[-2] > G.shape[-1]
    target = _normalised(G.mT if tall else G, eps, G.dtype)
    O = target  # noqa: E741
    for _ in range(steps):
        # eq 44 with O(OᵀO − I) = (OOᵀ)O − O, so that the Gram matrix is the one of the short side
        O = (1 + step_size) * O + step_size * target - 2 * step_size * (O @ O.mT) @ O  # noqa: E741
    return O.mT if tall else O
