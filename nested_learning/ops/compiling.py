"""Functions through torch.compile where there is a working compiler, plainly elsewhere."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Compiler = str | Callable[..., Any]
_numbers = itertools.count()


def has_new_strides(x: Tensor) -> bool:
    """Whether x has the strides of a new tensor, also where a dimension of 1 has no use for its own: a graph
    is for such strides alone."""
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


class Compiled:
    """A pure function through torch.compile; plainly from the first failure of the compiler on.

    Each has graphs of its own: torch.compile keeps them at the code of a function, and no more than eight.

    Args:
        plain: the function.
        what: its name in the warning.
        options: of torch.compile.

    Attributes:
        works: whether the compiler has not failed.
    """

    def __init__(self, plain: Callable[..., Any], what: str, **options: Any) -> None:
        assert isinstance(plain, FunctionType)
        self.plain, self.what = plain, what
        # equal code objects would count as one
        code = plain.__code__.replace(co_name=f"{plain.__name__}_{next(_numbers)}")
        own = FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
        own.__kwdefaults__ = plain.__kwdefaults__
        self._compiled = torch.compile(own, **options)
        self.works = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result. Where compiling fails, as without a C++ compiler, it warns once."""
        if not self.works:
            return self.plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            out = self.plain(*args, **kwargs)  # raises again what is not the compiler's
            self.works = False
            warnings.warn(
                f"torch.compile of {self.what} failed; it runs without from now on: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return out
