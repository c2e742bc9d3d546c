"""Derivatives that go forward (torch.func.jvp, jacfwd, hessian, forward_ad), and gradients of gradients."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_learning.layers import registry
from nested_learning.memory.engines import generic, token
from tests.models.small_models import VOCAB, small_model

CHUNKS = {"chunk_size": 4}
MIXERS = {
    "titans": CHUNKS,
    "self_modifying_titans": CHUNKS,
    "gated_deltanet": CHUNKS,
    "oja": CHUNKS,
    "dla": CHUNKS,
    "moneta": CHUNKS,
    "memora": CHUNKS,
    "attention": {},
    "sliding_window_attention": {"window": 4},
    "mac": {},
}


def layer_and_input(name):
    torch.manual_seed(0)
    layer = registry.build_mixer(name, 8, 2, MIXERS.get(name, {})).double()
    return layer, torch.randn(2, 10, 8, dtype=torch.float64), torch.randn(2, 10, 8, dtype=torch.float64)


def difference(function, x, v, step=1e-6):
    """Central difference of function along v."""
    with torch.no_grad():
        return (function(x + step * v) - function(x - step * v)) / (2 * step)


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MIXERS)
def test_jvp_is_the_finite_difference(name, gradients):
    layer, x, v = layer_and_input(name)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = False
    for run in (lambda x: layer(x)[0], lambda x: layer(x, None, mask)[0]):
        with torch.set_grad_enabled(gradients):
            y, along = jvp(run, (x,), (v,))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(run(forward_ad.make_dual(x, v)))
        expected = difference(run, x, v)
        torch.testing.assert_close(along, expected, **CLOSE)
        torch.testing.assert_close(dual.tangent, expected, **CLOSE)
        torch.testing.assert_close(y, run(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_jacobian_and_hessian(name):
    layer, x, v = layer_and_input(name)
    x, v = x[:1, :5], v[:1, :5]

    def run(x):
        return layer(x)[0]

    def energy(x):
        return run(x).square().sum()

    torch.testing.assert_close(jacfwd(run)(x), jacrev(run)(x), rtol=1e-11, atol=1e-11)
    along = (hessian(energy)(x).flatten(3) @ v.flatten()).view_as(x)
    torch.testing.assert_close(along, difference(grad(energy), x, v), **CLOSE)


@pytest.mark.parametrize("name", sorted(registry.MIXERS))
def test_gradients_of_gradients(name):
    layer, x, v = layer_and_input(name)

    def gradient(x):
        with sdpa_kernel(SDPBackend.MATH):
            energy = layer(x)[0].square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    x, step = x.requires_grad_(), 1e-6
    (along,) = torch.autograd.grad((gradient(x) * v).sum(), x)
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    torch.testing.assert_close(along, expected.detach(), **CLOSE)


@pytest.mark.parametrize("recompute", [None, "chunk"])
@pytest.mark.parametrize("update", ["none", "regression"])
def test_jvp_of_a_model_along_its_parameters(update, recompute):
    model = small_model(
        ["titans", "self_modifying_titans"],
        cms_update=update,
        recompute=recompute,
    )
    ids = torch.randint(0, VOCAB, (2, 13))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}

    def logits(step):
        moved = {name: p + step * along[name] for name, p in parameters.items()}
        return functional_call(model, moved, (ids,), {"use_cache": False}).logits

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, got = jvp(logits, (zero,), (one,))
    torch.testing.assert_close(got, difference(logits, zero, one), rtol=1e-5, atol=1e-5)


def test_one_token_without_gradients(monkeypatch):
    """Not by the engine for generation, whose operations have no such derivative."""
    layer, x, v = layer_and_input("self_modifying_titans")
    engines = []
    for engine in (token, generic):
        monkeypatch.setattr(engine, "run", lambda *a, e=engine, r=engine.run: (engines.append(e), r(*a))[1])
    with torch.no_grad():
        state = layer(x)[1]
        layer(x[:, :1], state)
        _, along = jvp(lambda x: layer(x, state)[0], (x[:, :1],), (v[:, :1],))
        expected = difference(lambda x: layer(x, state)[0], x[:, :1], v[:, :1])
    torch.testing.assert_close(along, expected, **CLOSE)
    assert token in engines
    assert generic in engines
