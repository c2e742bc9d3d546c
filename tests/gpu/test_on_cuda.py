"""On a GPU: the numbers of the CPU in float64, no wait for the device, and compiled steps."""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager

import pytest
import torch

from benchmarks import cases
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers import MIXERS, MemoryLayer, set_compile_step
from tests import layer_runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, CHUNK, TOKENS = 32, 16, 41  # two chunks, and not a multiple
NAMES = sorted(set(MIXERS) - {"memory"})
MEMORIES = sorted(
    name for name in NAMES if inspect.isclass(MIXERS[name]) and issubclass(MIXERS[name], MemoryLayer)
)
UPDATES = ["none", "regression", "lm"]


def mixer(name):
    torch.manual_seed(0)
    layer = cases.mixer(name, {"width": WIDTH, "heads": 2, "chunk": CHUNK})
    for module in layer.modules():
        if isinstance(module, MemoryLayer):
            module.backend = "torch"
    return layer


def model(update):
    torch.manual_seed(0)
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_heads=2,
            mixer_options={"self_modifying_titans": {"chunk_size": CHUNK, "projection_chunk_size": CHUNK}},
            cms_levels=[{"chunk_size": CHUNK}, {"chunk_size": 2 * CHUNK}],
            cms_update=update,
        )
    )


def run(layer, x, real):
    """What has a precision of all that a layer does."""
    return [t for t in layer_runs.run(layer, x, real) if t.is_floating_point()]


def assert_close(got, expected, tolerance):
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        scale = b.abs().max().clamp_min(1e-6)
        error = (a.detach().cpu().double() - b.detach().double()).abs().max() / scale
        assert error <= tolerance, f"tensor {index} differs by {error:.1e} of its largest entry"


@contextmanager
def no_waiting():
    """An error at whatever makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_layers_have_the_numbers_of_the_cpu(name, dtype, padded):
    layer = mixer(name)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :7] = not padded
    expected = run(copy.deepcopy(layer).double(), x.clone().requires_grad_(), real if padded else None)
    there = x.to("cuda", dtype).requires_grad_()
    got = run(layer.to("cuda", dtype), there, real.cuda() if padded else None)
    assert_close(got, expected, 1e-9 if dtype == torch.float64 else 5e-3)


@pytest.mark.parametrize("name", MEMORIES)
def test_compiled_steps_have_the_numbers_of_the_cpu(name):
    layer = mixer(name)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    expected = run(copy.deepcopy(layer).double(), x.clone().requires_grad_(), None)
    compiled = layer.to("cuda", torch.float32)
    set_compile_step(compiled, True)
    assert_close(run(compiled, x.to("cuda", torch.float32).requires_grad_(), None), expected, 5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_layers_never_wait(name):
    layer = mixer(name).cuda()
    x = torch.randn(2, TOKENS, WIDTH, device="cuda", requires_grad=True)
    real = torch.ones(2, TOKENS, dtype=torch.bool, device="cuda")
    run(layer, x, real)  # the first call loads kernels
    with no_waiting():
        run(layer, x, real)
        with torch.no_grad():
            _, state = layer(x)
            for _ in range(2):
                _, state = layer(x[:, :1], state)


@pytest.mark.parametrize("update", UPDATES)
def test_models_train_and_generate_as_on_the_cpu(update):
    hope = model(update)
    ids = torch.randint(64, (2, TOKENS))
    there = copy.deepcopy(hope).cuda()
    results = []
    for each, tokens in ((hope, ids), (there, ids.cuda())):
        loss = each(tokens, labels=tokens).loss
        results.append([loss, *torch.autograd.grad(loss, list(each.parameters()), allow_unused=True)])
        results[-1] = [t for t in results[-1] if t is not None]
    assert_close(results[1], results[0], 2e-2)
    expected = hope.eval().double().generate(ids[:1, :20], max_new_tokens=30, do_sample=False)
    got = there.eval().double().generate(ids[:1, :20].cuda(), max_new_tokens=30, do_sample=False)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("update", UPDATES)
def test_a_training_step_never_waits(update):
    hope = model(update).cuda()
    optimizer = torch.optim.AdamW(hope.parameters(), fused=True)
    ids = torch.randint(64, (2, TOKENS), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            hope(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with no_waiting():
        step()


def test_a_cached_token_never_waits():
    hope = model("none").cuda().eval()
    ids = torch.randint(64, (2, TOKENS), device="cuda")
    with torch.no_grad():
        cache = hope(ids, use_cache=True).past_key_values
        hope(ids[:, :1], past_key_values=cache)
        with no_waiting():
            for _ in range(CHUNK):
                hope(ids[:, :1], past_key_values=cache)
