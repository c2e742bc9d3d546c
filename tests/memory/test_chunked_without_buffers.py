"""The chunk algebra where every result is a new tensor: what a compiler is given."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.layers import Titans
from nested_learning.memory.engines import chunked
from nested_learning.memory.engines.chunked import scratch
from tests.memory.chunk_results import assert_same, batch, build, results


@pytest.fixture
def functional(monkeypatch):
    """A function that calls another with every result of the chunk algebra a new tensor."""

    class Functional(scratch.Scratch):
        def __init__(self, dtype, operands=None):
            super().__init__(dtype, operands, reuse=False)

    def call(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "Scratch", Functional)
            return f(*args)

    return call


FORMS = [
    {},
    {"adaptive_q": True, "expansion": 2.0},
    {"kind": Titans},
    {"kind": Titans, "momentum_scaled": False},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_without_buffers(options, functional):
    layer = build(**options)
    x = batch(layer, 2, 12)
    assert_same(functional(results, layer, x), results(layer, x), 1e-13)


class _Recorded(Exception):
    """Ends a run at the call that was to be recorded."""


def chunk_call(monkeypatch, name: str, layer: torch.nn.Module) -> tuple[Any, tuple[Any, ...]]:
    """One of the two functions of a chunk, and the arguments it got for the second chunk, without buffers."""
    function, calls = getattr(chunked, name), []

    def record(ws, *arguments):
        calls.append((scratch.Scratch(torch.float64, reuse=False), *arguments))
        if len(calls) == 2:
            raise _Recorded
        return function(*calls[-1])

    with monkeypatch.context() as patch, contextlib.suppress(_Recorded):
        patch.setattr(chunked, name, record)
        results(layer, batch(layer, 2, 12))
    return function, calls[1]


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("name", ["forward_chunk", "backward_chunk"])
@pytest.mark.parametrize("options", [{"adaptive_q": True}, {"kind": Titans}], ids=str)
def test_one_graph_without_buffers(options, name, backend, monkeypatch):
    """A compiler can follow a chunk from end to end, and it changes none of its arguments."""
    function, arguments = chunk_call(monkeypatch, name, build(**options))
    torch.compiler.reset()
    given = [t for t in pytree.tree_leaves(arguments[2:]) if isinstance(t, Tensor)]
    before = [t.clone() for t in given]
    with torch.no_grad():
        expected = function(*arguments)
        actual = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(given, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.compiler.reset()
