"""The optimizers that are compared, each with the grid its learning rate is tuned on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.optimizers import M3, DeepMomentumGD, DeltaMomentum, OrthogonalMomentum

Build = Callable[[list[Tensor], float], Optimizer]

# on one matrix: orthogonal tasks
SIMPLE: dict[str, Build] = {
    "gradient descent": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "delta momentum": lambda params, lr: DeltaMomentum(params, lr=lr, momentum=0.9),
    "DMGD": lambda params, lr: DeepMomentumGD(params, lr=lr),
    "Muon": lambda params, lr: OrthogonalMomentum(params, lr=lr),
    "M3": lambda params, lr: M3(params, lr=lr),
}
_GRADIENT_RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
_UNIT_RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]  # rules whose step does not depend on the gradient's size
REGRESSION_RATES: dict[str, list[float]] = {
    name: _UNIT_RATES if name in ("Adam", "Muon", "M3") else _GRADIENT_RATES for name in SIMPLE
}


def split(model: nn.Module, matrices: set[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters named in `matrices`, and all others."""
    named = list(model.named_parameters())
    return [p for n, p in named if n in matrices], [p for n, p in named if n not in matrices]


def _orthogonal(rule: Callable[..., Optimizer], **options: Any) -> Callable[..., Optimizer]:
    """A rule for the matrices; embeddings, heads and all that is no matrix go to AdamW at the same rate.

    Steps are scaled to the root mean square of AdamW's, so that one rate serves both.
    """

    def build(matrices: list[Tensor], rest: list[Tensor], lr: float, betas: tuple[float, float]) -> Optimizer:
        groups = [{"params": matrices}, {"params": rest, "adamw_only": True}]
        return rule(groups, lr=lr, adjust_lr="match_rms_adamw", adamw_betas=betas, **options)

    return build


# on a network: build(matrices, other parameters, lr, AdamW's betas); no weight decay anywhere
NETWORK: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda matrices, rest, lr, betas: torch.optim.AdamW(
        [*matrices, *rest], lr=lr, betas=betas, weight_decay=0.0
    ),
    "Muon": _orthogonal(OrthogonalMomentum),
    "M3": _orthogonal(M3),
    "DMGD": lambda matrices, rest, lr, betas: DeepMomentumGD([*matrices, *rest], lr=lr),
    # with P = 1/√v̂, without which it is SGD with momentum, far behind AdamW on every Transformer
    "DeltaMomentum": lambda matrices, rest, lr, betas: DeltaMomentum(
        [*matrices, *rest], lr=lr, preconditioner="diagonal", beta2=betas[1]
    ),
}
NETWORK_RATES: dict[str, list[float]] = {
    "AdamW": [1e-3, 3e-3, 1e-2, 3e-2],
    "Muon": [1e-3, 3e-3, 1e-2, 3e-2, 0.1],
    "M3": [1e-3, 3e-3, 1e-2, 3e-2, 0.1],
    "DMGD": [0.3, 1.0, 3.0, 10.0],
    "DeltaMomentum": [3e-4, 1e-3, 3e-3, 1e-2],
}
