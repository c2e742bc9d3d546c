"""Recomputing chunks in the backward pass: the same numbers, less kept."""

from __future__ import annotations

import pytest
import torch

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers.memory import MemoryLayer, set_recompute
from nested_learning.layers.registry import MIXERS, build_mixer

MEMORY_LAYERS = sorted(  # "memory" is no row of the table: it composes one from parts
    name
    for name, kind in MIXERS.items()
    if isinstance(kind, type) and issubclass(kind, MemoryLayer) and name != "memory"
)


def build(name):
    torch.manual_seed(0)
    return build_mixer(name, 8, 2, {"chunk_size": 2}).double()


def results(layer, x, mask=None, pieces=(19,)):
    """Outputs, states and gradients, the sequence fed in pieces."""
    y, state, outputs = None, None, []
    masks = [None] * len(pieces) if mask is None else mask.split(pieces, dim=1)
    for piece, piece_mask in zip(x.split(pieces, dim=1), masks, strict=True):
        y, state = layer(piece, state, piece_mask)
        outputs.append(y)
    outputs += [t for t in state.tensors() if t.is_floating_point()]
    total = sum(t.square().sum() for t in outputs)
    leaves = [x, *layer.parameters()]
    return [*outputs, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", MEMORY_LAYERS)
def test_nothing_changes(name):
    layer = build(name)
    x = torch.randn(2, 19, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :3], mask[1, 9:16] = False, False
    cases = ({}, {"mask": mask}, {"pieces": (5, 1, 13)}, {"mask": mask, "pieces": (15, 4)})
    for options in cases:  # of segments of at most six columns
        expected = results(layer, x, **options)
        assert set_recompute(layer, "chunk") == 1
        actual = results(layer, x, **options)
        set_recompute(layer, None)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["self_modifying_titans", "titans", "ttt_mlp"])
def test_less_is_kept(name):
    """Bytes that autograd holds on to, the weights at the boundaries aside."""
    layer = build(name)
    x = torch.randn(1, 128, 8, dtype=torch.float64)

    def kept() -> int:
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = layer(x)
        assert y.requires_grad
        return sum(storages.values())

    everything = kept()
    set_recompute(layer, "chunk")
    assert kept() < 0.5 * everything  # the rest are projections and norms


def test_in_a_model():
    options = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2}
    mixer = {"mixer_options": {"self_modifying_titans": {"chunk_size": 2}}}
    ids = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))
    slopes = []
    for how in (None, "chunk"):
        torch.manual_seed(0)
        model = HopeForCausalLM(HopeConfig(**options, **mixer, recompute=how)).train()
        assert [block.mixer.recompute for block in model.model.layers] == [how, how]
        model(input_ids=ids, labels=ids).loss.backward()
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="recompute must be None or 'chunk', got 'chunks'"):
        HopeConfig(recompute="chunks")
    with pytest.raises(ValueError, match="no block has one"):
        HopeConfig(mixer="attention", recompute="chunk")
