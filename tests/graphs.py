"""A compiler that counts the graphs it gets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch


def as_they_are(graph: Any, examples: Any) -> Any:
    """Runs a graph uncompiled."""
    return graph.forward


@contextmanager
def counted(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, run: Callable[..., Any] = as_they_are, **others: Any
) -> Iterator[list[Any]]:
    """The graphs that the module's `BACKEND` is given within the block, each of which `run` makes runnable.

    Args:
        others: further attributes of the module, by name.
    """
    found: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        found.append(graph)
        return run(graph, examples)

    torch.compiler.reset()
    for name, value in {"BACKEND": backend, **others}.items():
        monkeypatch.setattr(module, name, value)
    yield found
    torch.compiler.reset()
