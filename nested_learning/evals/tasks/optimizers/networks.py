"""Optimizers as they train networks: one rate serves matrices and all else."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from nested_learning.evals.methods.optimizers import OptimizerMethod

# Steps of matrices are scaled to the root mean square of AdamW's, so that one rate serves both.
SCALED = {"adjust_lr": "match_rms_adamw"}


def network_optimizer(method: OptimizerMethod, model: nn.Module, betas: tuple[float, float]) -> Optimizer:
    """The optimizer of a network, without weight decay.

    Args:
        method: at its learning rate.
        model: embeddings, heads and all that is no matrix go to AdamW where the rule is for matrices.
        betas: AdamW's.
    """
    if method.name in ("muon", "m3"):
        return method.build(model, betas, **SCALED)
    if method.name == "delta-momentum":
        # P = 1/√v̂, without which it is SGD with momentum, far behind AdamW on every Transformer
        return method.build(model, preconditioner="diagonal", beta2=betas[1])
    return method.build(model, betas)
