"""Nothing on the main way waits for the device: no number is looked at, no shape depends on one.

Tensors without numbers say so at once: on the device "meta", where the package takes the branches of an
accelerator, and as fake tensors, which say that they are on the CPU. tests/gpu asks a GPU itself.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import cases
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers import MIXERS

WIDTH, CHUNK, TOKENS = 16, 4, 9  # two chunks, and not a multiple
NAMES = sorted(set(MIXERS) - {"memory"})
WITHOUT_NUMBERS = pytest.mark.parametrize(
    ("mode", "device"),
    [
        pytest.param(nullcontext, "meta", id="meta"),
        pytest.param(FakeTensorMode, "cpu", id="fake", marks=pytest.mark.slow),
    ],
)


@contextmanager
def no_copies():
    """Refuses tensors made of Python's numbers, which are copied to the device, for which the host waits."""

    def refuse(*args, **kwargs):
        raise AssertionError("copies from the host")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", refuse)
        patch.setattr(torch, "as_tensor", refuse)
        patch.setattr(torch.Tensor, "new_tensor", refuse)
        yield


def mixer(name):
    return cases.mixer(name, {"width": WIDTH, "heads": 2, "chunk": CHUNK})


def model(update, layers=1, **options):
    levels = [{"chunk_size": CHUNK}, {"chunk_size": 2 * CHUNK}]
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_heads=2,
            mixer_options={"self_modifying_titans": {"chunk_size": CHUNK, "projection_chunk_size": CHUNK}},
            cms_levels=levels,
            cms_update=update,
            **options,
        )
    )


def read_and_learn(layer, x, real):
    y, state = layer(x)
    z, state = layer(x, state, real)
    w, _ = layer(x[:, :1], state)
    (y + z + w).sum().backward()
    with torch.no_grad():
        for _ in range(2):
            y, state = layer(x[:, :1], state)
    return y


@WITHOUT_NUMBERS
@pytest.mark.parametrize("name", NAMES)
def test_mixers(name, mode, device):
    with mode(), torch.device(device):
        layer, x = mixer(name), torch.randn(2, TOKENS, WIDTH, requires_grad=True)
        real = torch.ones(2, TOKENS, dtype=torch.bool)
        with no_copies():
            y = read_and_learn(layer, x, real)
        assert y.shape == (2, 1, WIDTH)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def train_and_generate(hope, ids, update):
    hope(ids, labels=ids).loss.backward()
    if update == "lm":  # where rows may stand at different places it looks whether one of them has to learn
        return
    hope(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    with torch.no_grad():
        cache = hope(ids, use_cache=True).past_key_values
        for _ in range(2):
            hope(ids[:, :1], past_key_values=cache)


@WITHOUT_NUMBERS
@pytest.mark.parametrize(
    ("update", "recompute"),
    [
        ("none", None),
        ("none", "chunk"),
        ("regression", None),
        pytest.param("regression", "chunk", marks=pytest.mark.slow),
        ("lm", None),
        ("lm", "chunk"),
    ],
)
def test_models(update, recompute, mode, device):
    with mode(), torch.device(device):
        hope = model(update, recompute=recompute)
        ids = torch.zeros(2, TOKENS, dtype=torch.long)
        with no_copies():
            train_and_generate(hope, ids, update)
        assert all(p.grad is not None for n, p in hope.named_parameters() if "writers" not in n)


def test_a_look_at_a_number_is_found():
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool(torch.ones(2, device="meta").any())
    with FakeTensorMode(), pytest.raises(RuntimeError, match="_local_scalar_dense"):
        bool(torch.ones(2).any())
