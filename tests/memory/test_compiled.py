"""The step of a chunk through torch.compile: the same numbers, one graph for every length, a fallback."""

from __future__ import annotations

import warnings

import pytest
import torch

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers.memory import set_compile_step
from nested_learning.layers.registry import build_mixer
from nested_learning.memory.engines import compiler
from tests.graphs import counted


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs; runs them as they are."""
    with counted(monkeypatch, compiler, _broken=False, _rows={}) as found:
        yield found


def build(name, **options):
    torch.manual_seed(0)
    return build_mixer(name, 8, 2, {"chunk_size": 4, **options}).double()


def results(layer, x, mask=None):
    y, state = layer(x, mask=mask)
    leaves = [x, *layer.parameters()]
    total = y.square().sum() + sum(t.square().sum() for t in state.current.values())
    return [y, *state.current.values(), *torch.autograd.grad(total, leaves, allow_unused=True)]


@pytest.mark.parametrize("name", ["ttt_mlp", "dla", "moneta", "yaad", "gated_deltanet"])
def test_nothing_changes(name, graphs):
    layer = build(name)
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    expected = results(layer, x)
    assert set_compile_step(layer, True) == 1
    for a, b in zip(results(layer, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert graphs


def test_no_length_and_no_chunk_compiles_anew(graphs):
    layer = build("ttt_mlp")
    set_compile_step(layer, True)
    for length in (8, 12, 13, 40, 4, 27):
        layer(torch.randn(2, length, 8, dtype=torch.float64))[0].sum().backward()
    assert len(graphs) <= 2  # the first chunk starts at its anchor's copy, the others at the last chunk's end
    before = len(graphs)
    layer(torch.randn(3, 8, 8, dtype=torch.float64))
    assert len(graphs) > before  # the count counts: another batch size is another graph


def test_few_numbers_of_rows_are_compiled(graphs, monkeypatch):
    """Documents in a row come in any number: the others run plainly, without a word."""
    monkeypatch.setattr(compiler, "ROWS", 2)
    layer = build("deltanet")
    set_compile_step(layer, True)
    found = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", RuntimeWarning)
        for rows in (2, 3, 4, 5, 2, 3):
            layer(torch.randn(rows, 8, 8, dtype=torch.float64))
            found.append(len(graphs))
    assert 0 < found[0] < found[1] == found[-1]


def test_kinds_do_not_count_against_each_other(graphs):
    """torch stops compiling a function after eight graphs, for every layer that would use it."""
    widths = (4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
    with torch.no_grad():
        for width in widths:
            torch.manual_seed(0)
            layer = build_mixer("deltanet", width, 2, {"chunk_size": 4})
            set_compile_step(layer, True)
            layer(torch.randn(2, 4, width))
    assert len(graphs) == len(widths)


def test_one_warning_where_there_is_no_compiler(graphs, monkeypatch):
    def backend(graph, _):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiler, "BACKEND", backend)
    layer = build("ttt_mlp")
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    expected = results(layer, x)
    set_compile_step(layer, True)
    with pytest.warns(RuntimeWarning, match="no compiler here"):
        actual = results(layer, x)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(layer, x)


def test_in_a_model():
    model = HopeForCausalLM(
        HopeConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_heads=2, mixer="dla", compile_step=True
        )
    )
    assert [block.mixer.compile_step for block in model.model.layers] == [True, True]


def test_refusals():
    with pytest.raises(ValueError, match="compile_step must be True or False, got 'yes'"):
        HopeConfig(compile_step="yes")
    with pytest.raises(ValueError, match="compile_step=True is for memory layers"):
        HopeConfig(mixer="attention", compile_step=True)
