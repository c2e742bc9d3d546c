"""One constructor per optimizer, for the tests that every optimizer must pass."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from nested_learning import optimizers as no

Build = Callable[..., Optimizer]

CASES: dict[str, Build] = {
    "gd": lambda params, **k: no.MemoryOptimizer(params, no.GDMemory(), **{"lr": 0.05, **k}),
    "momentum": lambda params, **k: no.MemoryOptimizer(params, no.MomentumMemory(), **{"lr": 0.02, **k}),
    "adam": lambda params, **k: no.MemoryOptimizer(params, no.AdamMemory(), **{"lr": 0.05, **k}),
    "adagrad": lambda params, **k: no.MemoryOptimizer(params, no.AdaGradMemory(), **{"lr": 0.5, **k}),
}
