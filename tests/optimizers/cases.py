"""One constructor per optimizer, for the tests that every optimizer must pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from nested_learning import optimizers as no

Build = Callable[..., Optimizer]


def multi_frequency(params, error_if_nonfinite=False, **options):
    inner = lambda groups: no.MemoryOptimizer(groups, no.AdamMemory(), **{"lr": 0.05, **options})  # noqa: E731
    return no.MultiFrequency(params, inner, error_if_nonfinite=error_if_nonfinite)


def delta_gd(params, **options):
    """On gradients set by hand, without inputs: the rule of the other parameters."""
    optimizer = no.DeltaGD(params, **{"lr": 0.02, "inner": "momentum", **options})
    layer = nn.Linear(1, 1)
    layer.weight = next(p for p in optimizer.param_groups[0]["params"] if p.ndim > 1)
    return optimizer.attach(layer)


CASES: dict[str, Build] = {
    "gd": lambda params, **k: no.MemoryOptimizer(params, no.GDMemory(), **{"lr": 0.05, **k}),
    "momentum": lambda params, **k: no.MemoryOptimizer(params, no.MomentumMemory(), **{"lr": 0.02, **k}),
    "adam": lambda params, **k: no.MemoryOptimizer(params, no.AdamMemory(), **{"lr": 0.05, **k}),
    "adagrad": lambda params, **k: no.MemoryOptimizer(params, no.AdaGradMemory(), **{"lr": 0.5, **k}),
    "preconditioned": lambda params, **k: no.PreconditionedMomentum(params, **{"lr": 0.02, **k}),
    "preconditioned-diagonal": lambda params, **k: no.PreconditionedMomentum(
        params, **{"lr": 0.02, "preconditioner": "diagonal", **k}
    ),
    "preconditioned-learned": lambda params, **k: no.PreconditionedMomentum(
        params, **{"lr": 0.02, "preconditioner": "learned", **k}
    ),
    "delta": lambda params, **k: no.DeltaMomentum(params, **{"lr": 0.1, **k}),
    "delta-paper": lambda params, **k: no.DeltaMomentum(
        params, **{"lr": 0.05, "scale": "paper", "beta": 0.01, **k}
    ),
    "feature": lambda params, **k: no.FeatureMomentum(params, **{"lr": 0.01, **k}),
    "feature-paper": lambda params, **k: no.FeatureMomentum(
        params, **{"lr": 0.01, "scale": "paper", "coefficients": (1.0, 0.0, 0.05), **k}
    ),
    "orthogonal": lambda params, **k: no.OrthogonalMomentum(params, **{"lr": 0.05, **k}),
    "orthogonal-cubic": lambda params, **k: no.OrthogonalMomentum(
        params, **{"lr": 0.05, "iteration": "cubic", "ns_steps": 30, **k}
    ),
    "m3": lambda params, **k: no.M3(params, **{"lr": 0.1, "frequency": 3, **k}),
    "m3-paper": lambda params, **k: no.M3(params, **{"lr": 0.3, "frequency": 3, "paper_exact": True, **k}),
    "dmgd": lambda params, **k: no.DeepMomentumGD(params, **{"lr": 0.05, **k}),
    "dmgd-l2": lambda params, **k: no.DeepMomentumGD(
        params, **{"lr": 0.05, "objective": "l2", "shared_memory": False, **k}
    ),
    "dmgd-surrogate": lambda params, **k: no.DeepMomentumGD(
        params, **{"lr": 0.05, "objective": "surrogate", "depth": 3, "rank": 2, "hidden_size": 4, **k}
    ),
    "delta-gd": delta_gd,
    "multi-frequency": multi_frequency,
}
