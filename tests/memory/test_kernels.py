"""The choice of the backend, and its parity with the torch path (on a GPU)."""

from __future__ import annotations

import pytest
import torch

from nested_learning.layers import MIXERS, DeltaNet
from nested_learning.memory.compose import compose
from nested_learning.memory.engines import fla
from nested_learning.memory.running import Call

ROWS = ["linear_attention", "retnet", "deltanet", "gated_deltanet"]


def call(**changes):
    """Facts of a call that goes by the kernels where they are installed."""
    facts = dict.fromkeys(Call._fields, False)
    facts |= {
        "device": "cuda",
        "dtype": torch.bfloat16,
        "backend": "auto",
        "whole_chunks": True,
        "grad": True,
    }
    return Call(**{**facts, **changes})


def test_what_has_a_kernel():
    for name in ROWS:
        assert fla.covers(MIXERS[name](hidden_size=8, num_heads=2).system)
    for name in ("oja", "ttt_linear", "titans", "self_modifying_titans"):
        assert not fla.covers(MIXERS[name](hidden_size=8, num_heads=2).system)
    dgd = compose(architecture="matrix", objective="dot", rule="dgd", gradient="token")
    assert not fla.covers(dgd)


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_the_kernels_only_for_half_precision_on_cuda_where_they_are(monkeypatch, there):
    monkeypatch.setattr(fla, "installed", lambda: there)
    system = DeltaNet(8, 2).system
    assert fla.can_run(system, call()) is there
    assert not fla.can_run(system, call(dtype=torch.float32))
    assert not fla.can_run(system, call(device="cpu"))
    assert not fla.can_run(system, call(backend="torch"))
    assert not fla.can_run(system, call(surprise=True))
    assert not fla.can_run(MIXERS["oja"](8, 2).system, call())


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        DeltaNet(8, 2, backend="triton")  # type: ignore[arg-type]
    monkeypatch.setattr(fla, "installed", lambda: False)
    with pytest.raises(ImportError, match="needs the package flash-linear-attention"):
        DeltaNet(8, 2, backend="fla")
    monkeypatch.setattr(fla, "installed", lambda: True)
    with pytest.raises(ValueError, match="no kernel for this memory"):
        fla.check_backend("fla", MIXERS["titans"](8, 2).system)
    with pytest.raises(ValueError, match="runs on CUDA, but x is on cpu"):
        DeltaNet(8, 2, backend="fla")(torch.randn(1, 3, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_equal_torch(name, padded):
    """Products in bfloat16 on both sides of the comparison's inputs: a few parts in a hundred."""
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    torch.manual_seed(0)
    layers = [MIXERS[name](hidden_size=128, num_heads=2, backend=b).cuda() for b in ("torch", "fla")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 200, 128, device="cuda")
    mask = None
    if padded:
        mask = torch.ones(2, 200, dtype=torch.bool, device="cuda")
        mask[0, :30] = False
    results = []
    for layer in layers:
        y, state = layer(x[:, :120], mask=None if mask is None else mask[:, :120])
        z, state = layer(x[:, 120:], state)
        out = torch.cat([y, z], dim=1)
        gradients = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        results.append([out, *state.current.values(), *gradients])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm() + 1e-6
