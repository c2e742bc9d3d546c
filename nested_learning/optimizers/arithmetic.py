"""Arithmetic of the optimizers: dtypes, matrices of parameters, numbers of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_learning.ops.norm import magnitude
from nested_learning.optimizers.sharded import agreed, is_sharded, local

Group = dict[str, Any]


def work_dtype(p: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic: float32 for half-precision parameters, else the parameter's."""
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def as_matrix(t: Tensor) -> Tensor:
    """The (out, in) view that the matrix rules use: (n,) is one row (1, n); (out, a, b, …) is flattened."""
    return t.reshape(1, -1) if t.ndim < 2 else t.flatten(1)


def matrix_shape(p: Tensor) -> torch.Size:
    """The shape of `as_matrix(p)`, also of a parameter that lies in shards."""
    rows = p.shape[0] if p.ndim > 1 else 1
    return torch.Size((rows, p.numel() // max(rows, 1)))


def entry(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """The tensor `name` of a parameter's state; it starts as zeros like `like`."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    tensor: Tensor = state[name]
    return tensor


def learning_rate(group: Group, device: torch.device) -> Tensor | float:
    """The group's lr: a number, or where it is a tensor a 0-D one on `device`."""
    lr: Tensor | float = group["lr"]
    return lr.reshape(()).to(device) if isinstance(lr, Tensor) else lr


def root_mean_square(g: Tensor) -> Tensor:
    """√mean(g²), 0-D, of numbers of any size; 0 for zeros."""
    s = magnitude(g)
    return (s * (g / s).square().mean().sqrt()).reshape(())


def divisible(eps: float, dtype: torch.dtype) -> float:
    """ε of √v + ε, at least the root of the smallest v > 0: where g² rounds to 0, g/(√v + ε) is near 0."""
    info = torch.finfo(dtype)
    return max(eps, float(info.tiny * info.eps) ** 0.5)


def unit_matrix(G: Tensor) -> Tensor:
    """G/‖G‖_F of a matrix with numbers of any size, and 0 for 0."""
    G = G / magnitude(G)
    return G / G.norm().clamp(min=torch.finfo(G.dtype).tiny)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in a state (nested dicts, tuples and lists)."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is NaN or infinite: the one host synchronisation of a step.

    An element of one process's shard counts for all processes.
    """
    if not tensors:
        return True
    here = [stored_numbers(local(t)) for t in tensors]
    home = here[0].device
    norms = torch.stack([n.to(home, torch.float32) for n in torch._foreach_norm(here)])
    finite = bool(norms.isfinite().all())
    if not finite:  # the norm may have overflowed: look again
        finite = all(bool(t.isfinite().all()) for t in here)
    if any(is_sharded(t) for t in tensors):
        return bool(agreed(tensors, torch.tensor([finite], device=home)).all())
    return finite


def stored_numbers(grad: Tensor) -> Tensor:
    """The elements of a gradient; those that are stored of a sparse one."""
    return grad if grad.layout == torch.strided else grad._values()
