"""Arithmetic that the fused runs share: buffers, products into them, the hidden layer of an MLP memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.ops.mlp_memory import HIDDEN_FLOOR

LOG_FLOOR = -80.0  # that of ops.delta_rule.chunk.Decay


class Scratch:
    """Buffers by name, made at first use and written over by each chunk in turn, and the products into them.

    Fresh memory costs more than arithmetic on memory that is in a cache.

    Args:
        like: its dtype and device are the buffers'.
        operands: dtype that the factors of products are rounded to; each product is summed in float32, and
            what it is added to stays in the buffers' dtype. None: that dtype.
    """

    def __init__(self, like: Tensor, operands: torch.dtype | None = None) -> None:
        self._like = like
        self._operands = None if operands == like.dtype else operands
        self._buffers: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._like.new_empty(shape, dtype=dtype)
        return buffer

    def low(self, name: Hashable, x: Tensor) -> Tensor:
        """x as a factor of several products: rounded once, into a buffer; x itself without `operands`."""
        if self._operands is None:
            return x
        return self(("low", name, x.shape), x.shape, self._operands).copy_(x)

    def _factor(self, side: str, x: Tensor) -> Tensor:
        x = x.flatten(0, -3)
        if self._operands in (None, x.dtype):
            return x
        name = side, x.shape, x.stride()
        buffer = self._buffers.get(name)
        if buffer is None:  # in the layout of x: transposing while rounding is slow
            buffer = self._buffers[name] = torch.empty_like(x, dtype=self._operands)
        return buffer.copy_(x)

    def _rounded(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b with rounded factors, in their dtype: a buffer that the next product overwrites."""
        a, b = self._factor("left", a), self._factor("right", b)
        shape = (len(a), a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=self(("product", shape), shape, self._operands))

    def bmm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b over the leading dimensions, which are the same."""
        if out is None:
            out = self._like.new_empty((*a.shape[:-1], b.shape[-1]))
        if self._operands is None:
            torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
        else:
            out.flatten(0, -3).copy_(self._rounded(a, b))
        return out

    def named_bmm(self, name: Hashable, a: Tensor, b: Tensor) -> Tensor:
        """The same into a buffer."""
        return self.bmm(a, b, out=self(name, (*a.shape[:-1], b.shape[-1])))

    def add_bmm(self, out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        """out += alpha a @ b, without rounded factors inside the product; returns `out`."""
        flat = out.flatten(0, -3)
        if self._operands is None:
            flat.baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=alpha)
        else:
            flat.add_(self._rounded(a, b), alpha=alpha)
        return out

    def mul(self, name: Hashable, a: Tensor, b: Tensor) -> Tensor:
        """a * b, of a's shape."""
        return torch.mul(a, b, out=self(name, a.shape))

    def repeat(self, name: str, x: Tensor, count: int) -> Tensor:
        """`count` copies of x along a new first dimension."""
        return self((name, x.dtype), (count, *x.shape), x.dtype).copy_(x)

    def rows_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ along the last dimension, kept; not a buffer but a new tensor."""
        return self.mul(a.shape, a, b).sum(-1, keepdim=True)

    def silu(self, name: str, z: Tensor) -> Tensor:
        return torch.ops.aten.silu.out(z, out=self(name, z.shape))


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
