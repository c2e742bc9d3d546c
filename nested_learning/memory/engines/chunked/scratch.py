"""Where the chunk algebra puts its results: buffers that it reuses, or new tensors for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Results by name, and products of matrices.

    With `reuse`, a result goes into the buffer of its name, made at first use and written over by each chunk
    in turn: fresh memory costs more than arithmetic on memory that is in a cache. An operation that is given
    the buffer of its own name works in place. Without `reuse`, every result is a new tensor and nothing that
    came from outside of the chunk is changed: functions that a compiler can trace. The numbers are the same.

    Args:
        dtype: that of the results.
        operands: dtype that the factors of products are rounded to; each product is summed in float32, and
            what it is added to stays in `dtype`. None: that dtype.
    """

    def __init__(self, dtype: torch.dtype, operands: torch.dtype | None = None, reuse: bool = True) -> None:
        self._dtype = dtype
        self._operands = None if operands == dtype else operands
        self._reuse = reuse
        self._buffers: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """op(*args, **kwargs) in the buffer `name`, whose next result overwrites it. `op` takes `out`."""
        if not self._reuse:
            return op(*args, **kwargs)
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = op(*args, **kwargs)
            return buffer
        return op(*args, **kwargs, out=buffer)

    def _cast(self, name: Hashable, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        if not self._reuse:
            return x.to(dtype)
        buffer = self._buffers.get(name)
        if buffer is None:  # in the layout of x: transposing while rounding is slow
            buffer = self._buffers[name] = torch.empty_like(x, dtype=dtype)
        return buffer.copy_(x)

    def low(self, name: str, x: Tensor) -> Tensor:
        """x as a factor of several products: rounded once, into a buffer; x itself without `operands`."""
        return x if self._operands is None else self._cast(("low", name, x.shape), x, self._operands)

    def _rounded(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b [n, rows, columns] with rounded factors, in their dtype; the next product overwrites it."""
        factors = []
        for side, x in (("left", _batch(a)), ("right", _batch(b))):
            rounded = x.dtype == self._operands
            factors.append(x if rounded else self._cast((side, x.shape, x.stride()), x, self._operands))
        a, b = factors
        return self(("product", len(a), a.shape[1], b.shape[2]), torch.bmm, a, b)

    def bmm(self, a: Tensor, b: Tensor, name: Hashable = None) -> Tensor:
        """a @ b over the leading dimensions, which are the same; a new tensor without a name."""
        shape = (*a.shape[:-1], b.shape[-1])
        if self._operands is not None:
            product = self._rounded(a, b).view(shape)
            if name is None:
                return product.to(self._dtype, copy=True)
            return self._cast(name, product, self._dtype)
        a, b = _batch(a), _batch(b)
        buffer = self._buffers.get(name)
        if buffer is not None:
            torch.bmm(a, b, out=_batch(buffer))
            return buffer
        product = torch.bmm(a, b).view(shape)
        if self._reuse and name is not None:
            self._buffers[name] = product
        return product

    def add_bmm(
        self, base: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, at: slice | None = None
    ) -> Tensor:
        """base + alpha a @ b, in the place of `base` with `reuse`; `at`: at these first indices alone.

        The sum is taken inside the product, or outside of rounded factors.
        """
        part = base if at is None else base[at]
        flat = _batch(part)
        if self._operands is not None:
            product = self._rounded(a, b)
            total = flat.add_(product, alpha=alpha) if self._reuse else flat.add(product, alpha=alpha)
        else:
            add = flat.baddbmm_ if self._reuse else flat.baddbmm
            total = add(_batch(a), _batch(b), alpha=alpha)
        if self._reuse:
            return base
        total = total.view(part.shape)
        return total if at is None else base.slice_scatter(total, 0, at.start, at.stop)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ along the last dimension, kept: a new tensor."""
        return self(("dot", a.shape), torch.mul, a, b).sum(-1, keepdim=True)


def _batch(x: Tensor) -> Tensor:
    """[n, M, rows, columns] -> [n·M, rows, columns]; one memory alone is a cheaper case."""
    return x.squeeze(0) if len(x) == 1 else x.flatten(0, 1)
