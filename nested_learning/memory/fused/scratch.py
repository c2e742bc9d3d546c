"""Arithmetic that the fused runs share: buffers, products into them, the hidden layer of an MLP memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.mlp_memory import HIDDEN_FLOOR

LOG_FLOOR = -80.0  # that of ops.delta_rule.chunk.Decay


class Scratch:
    """Buffers by name, made at first use and written over by each chunk in turn.

    Fresh memory costs more than arithmetic on memory that is in a cache.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, shape: Sequence[int]) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._like.new_empty(shape)
        return buffer

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b over the two leading dimensions."""
        return bmm(a, b, out=self(name, (*a.shape[:-1], b.shape[-1])))

    def mul(self, name: Hashable, a: Tensor, b: Tensor) -> Tensor:
        """a * b, of a's shape."""
        return torch.mul(a, b, out=self(name, a.shape))

    def repeat(self, name: str, x: Tensor, count: int) -> Tensor:
        """`count` copies of x along a new first dimension."""
        return self(name, (count, *x.shape)).copy_(x)

    def rows_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ along the last dimension, kept; not a buffer but a new tensor."""
        return self.mul(a.shape, a, b).sum(-1, keepdim=True)

    def silu(self, name: str, z: Tensor) -> Tensor:
        return torch.ops.aten.silu.out(z, out=self(name, z.shape))


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b over the two leading dimensions."""
    if out is None:
        out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """out += alpha a @ b, the sum taken inside the product."""
    out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=alpha)
    return out


def unscale_(ws: Scratch, g: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """The gradient through y = x f(‖x‖): f (g − y ⟨y, g⟩), in g's place."""
    return g.addcmul_(y, ws.rows_dot(y, g), value=-1).mul_(f)


def silu_backward_(g: Tensor, z: Tensor) -> Tensor:
    """The gradient through silu(z), in g's place."""
    return torch.ops.aten.silu_backward.grad_input(g, z, grad_input=g)


def _inverse_norm(x: Tensor, floor: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().add_(floor**2).rsqrt_()


def hidden(ws: Scratch, name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """u = n(silu(z)) and the factor f of n."""
    h = ws.silu(name, z)
    f = _inverse_norm(h, HIDDEN_FLOOR)
    return h.mul_(f), f


class Hidden(NamedTuple):
    """The hidden vectors recomputed, with the derivatives of silu; buffers."""

    u: Tensor
    first: Tensor  # silu′(z)
    second: Tensor  # silu″(z)


def hidden_derivatives(ws: Scratch, z: Tensor, f: Tensor) -> Hidden:
    s = torch.sigmoid(z, out=ws("silu'", z.shape))
    h = ws.mul("h", z, s)
    u = ws.mul("u", h, f)
    slope = torch.addcmul(s, s, s, value=-1, out=ws("silu''", z.shape))  # s (1 − s)
    h.addcmul_(h, s, value=-1)  # z s (1 − s)
    # silu″ = s (1 − s) (2 + z (1 − 2 s)); silu′ = s + z s (1 − s)
    second = slope.mul_(2).add_(h).addcmul_(h, s, value=-2)
    return Hidden(u, s.add_(h), second)
