"""The package as on a GPU, without one: nothing of it stays on the CPU, and the numbers are the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from nested_learning import HopeCache
from nested_learning.continual import Replay, reopen, stack_levels
from nested_learning.models import HopeLayer, HopeLayerState
from tests.continual.test_options_together import LEVELS
from tests.continual.tiny_models import random_ids, tiny_model
from tests.elsewhere import Elsewhere, elsewhere
from tests.layer_runs import run
from tests.models.test_no_waiting import CHUNK, NAMES, TOKENS, WIDTH, mixer, model
from tests.optimizers.cases import CASES


def assert_same(got, expected):
    for index, (there, here) in enumerate(zip(got, expected, strict=True)):
        assert isinstance(there, Elsewhere), index
        torch.testing.assert_close(there.inner, here.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_mixers(name, padded):
    torch.manual_seed(0)
    layer = mixer(name)
    x, real = torch.randn(2, TOKENS, WIDTH), torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :3] = False
    expected = run(copy.deepcopy(layer), x.clone().requires_grad_(), real if padded else None)
    with elsewhere() as device:
        got = run(layer.to(device), x.to(device).requires_grad_(), real.to(device) if padded else None)
    assert_same(got, expected)


def loss_and_gradients(hope, ids, real):
    loss = hope(ids, labels=ids, attention_mask=real).loss
    gradients = torch.autograd.grad(loss, list(hope.parameters()), allow_unused=True)
    return [loss, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", [None, "chunk"])
@pytest.mark.parametrize("update", ["none", "regression", "lm"])
def test_models(update, recompute, padded):
    torch.manual_seed(0)
    hope, ids = model(update, recompute=recompute), torch.randint(32, (2, TOKENS))
    real = torch.ones_like(ids) if padded else None
    if real is not None:
        real[0, :3] = 0
    expected = loss_and_gradients(hope, ids, real)
    with elsewhere() as device:
        real = None if real is None else real.to(device)
        got = loss_and_gradients(hope.to(device), ids.to(device), real)
    assert_same(got, expected)


@pytest.mark.parametrize("update", ["none", "regression", "lm"])
def test_a_session_goes_on_where_the_model_is(update, tmp_path):
    torch.manual_seed(0)
    hope, path = model(update).eval(), tmp_path / "session.safetensors"
    ids = torch.randint(32, (2, TOKENS))
    expected = hope.generate(ids, max_new_tokens=6, do_sample=False)
    with elsewhere() as device, torch.no_grad():
        hope.to(device)
        hope(ids[:, :-1].to(device), use_cache=True).past_key_values.save(path)
        cache = HopeCache.load(path, hope)
        assert {t.device for state in cache.states.values() for t in state.to_tensors().values()} == {device}
        assert cache.tokens_seen.device == device
        got = hope.generate(ids.to(device), past_key_values=cache, max_new_tokens=6, do_sample=False)
        beams = hope.generate(ids.to(device), max_new_tokens=3, num_beams=2, do_sample=True)
        for here in (HopeCache.load(path, hope.config), HopeCache.load(path, hope, "cpu")):
            assert here.tokens_seen.device == torch.device("cpu")
    assert beams.shape == (2, TOKENS + 3)
    assert torch.equal(got.inner, expected)


def test_a_session_of_a_model_on_two_devices(tmp_path):
    torch.manual_seed(0)
    hope, path = model("regression", layers=2).eval(), tmp_path / "session.safetensors"
    ids = torch.randint(32, (2, TOKENS))
    expected = hope.generate(ids, max_new_tokens=6, do_sample=False)
    with elsewhere() as device, torch.no_grad():
        add_hook_to_module(hope, AlignDevicesHook("cpu", io_same_device=True, skip_keys="past_key_values"))
        far = hope.model.layers[1].to(device)
        add_hook_to_module(far, AlignDevicesHook(device, io_same_device=True, skip_keys="past_key_values"))
        hope(ids[:, :-1], use_cache=True).past_key_values.save(path)
        cache = HopeCache.load(path, hope)
        assert cache.states["layers.0.mixer"].position.device == torch.device("cpu")
        assert cache.states["layers.1.mixer"].position.device == device
        got = hope.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)


def test_the_state_of_a_block_goes_on_where_the_block_is(tmp_path):
    torch.manual_seed(0)
    layer = HopeLayer(WIDTH, num_heads=2, cms_levels=[{"chunk_size": CHUNK}])
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        _, state = layer(x)
        state.save(tmp_path / "state", layer)
        expected = layer(x, state)[0]
    with elsewhere() as device, torch.no_grad():
        got = layer.to(device)(x.to(device), HopeLayerState.load(tmp_path / "state", layer))[0]
    assert_same([got], [expected])


@pytest.mark.parametrize("name", CASES)
def test_optimizers(name):
    def walk(device):
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 6), (5, 3), (6,), (), (4, 2, 3, 3)]
        params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        torch.manual_seed(0)  # memories that are networks begin somewhere
        optimizer = CASES[name](params)
        for step in range(5):
            if step == 3:  # what was saved goes on
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = CASES[name](params)
                optimizer.load_state_dict(state)
            for p in params:
                p.grad = p.detach().cos() + torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        return params

    expected = walk("cpu")
    with elsewhere() as device:
        got = walk(device)
    if not name.startswith(("orthogonal", "m3")):
        assert_same(got, expected)
    for there, here in zip(got, expected, strict=True):  # Newton and Schulz's steps are in bfloat16 on a GPU
        assert (there.inner - here).norm() <= 0.05 * here.norm()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("full", "llama"),
        *(pytest.param(kind, "llama", marks=pytest.mark.slow) for kind in ("sparse", "rank")),
        *(pytest.param(kind, "gpt2", marks=pytest.mark.slow) for kind in LEVELS),
    ],
)
def test_a_learner_of_all_options(kind, family, tmp_path):
    """Reading, files, sources forgotten, scopes and answers; ids may be on either device."""

    def live(base, device):
        options = {"replay": Replay(500, share=0.4, piece=6), "background": random_ids(40, seed=9)}
        learner = stack_levels(base, levels=LEVELS[kind], window=24, overlap=5, **options)
        found = [learner.observe(random_ids(33).to(device), source="a")]
        found.append(learner.observe(random_ids(19), source="b"))
        learner.memory.save(tmp_path / f"{device}")
        learner = reopen(tmp_path / f"{device}", base, background=random_ids(40, seed=9))
        with learner.adaptation_scope():
            found.append(learner.observe(random_ids(20, seed=2).to(device)))
        learner.forget("a")
        probe = random_ids(14, seed=4)
        found += [learner.score(probe.to(device)), learner.logits(probe[None])]
        found.append(learner.generate(probe[None], max_new_tokens=5, do_sample=False))
        learner.export(tmp_path / f"adapter-{device}", lora_rank=4)
        return found

    base = tiny_model(family)
    expected = live(base, "cpu")
    with elsewhere() as device:
        got = live(copy.deepcopy(base).to(device), device)
        for there, here in zip(got, expected, strict=True):
            torch.testing.assert_close(there.cpu(), here, equal_nan=True)


def test_a_tensor_of_the_cpu_is_found():
    with elsewhere() as device:
        layer = nn.Linear(2, 2).to(device)
        with pytest.raises(RuntimeError, match="on the same device"):
            layer(torch.ones(1, 2))
        with pytest.raises(TypeError, match="to numpy"):
            layer(torch.ones(1, 2, device=device)).detach().numpy()
