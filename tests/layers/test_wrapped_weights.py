"""Linear layers under parametrizations, masks and hooks act and get gradients, in every layer and mode."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from nested_learning.layers import DeltaNet
from nested_learning.layers.drop_in import LowRankSelfModifyingMLP, SelfModifyingLinear
from nested_learning.layers.effective import effective
from nested_learning.layers.token_inputs import is_plain
from nested_learning.optimizers import DeltaGD
from tests.ecosystem.tiny_hope import LEARNING, hope, ids, slow_but

TEXT = ids(tokens=9)
CASES = ["self_modifying_titans", "titans", "mac", "attention", *LEARNING]


class Doubled(nn.Module):
    """A weight that is not a parameter."""

    def forward(self, weight):
        return 2 * weight


def add_low_rank(linear):
    """An adapter that is a hook: y + U V x."""
    V = nn.Parameter(0.1 * torch.randn(2, linear.in_features).double())
    U = nn.Parameter(0.1 * torch.randn(linear.out_features, 2).double())
    linear.register_forward_hook(lambda _, args, y: y + args[0] @ V.T @ U.T)
    linear.extra = (U, V)


def weight_of(linear):
    if hasattr(linear, "extra"):
        U, V = linear.extra
        return linear.weight + U @ V
    return linear.weight


def mask(linear):
    torch.manual_seed(linear.in_features)
    prune.random_unstructured(linear, "weight", amount=0.3)


WRAPPERS = {
    "weight_norm": lambda linear: parametrizations.weight_norm(linear),
    "spectral_norm": lambda linear: parametrizations.spectral_norm(linear),
    "doubled": lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
    "pruned": mask,
    "hook": add_low_rank,
}


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", slow_but(["titans", "regression nested exact", "lm"], CASES))
def test_a_wrapped_model_is_one_with_its_weights_written_out(case, wrapper):
    """The same loss and gradients, to everything that the weights are made of."""
    plain = hope(case)
    wrapped = copy.deepcopy(plain)
    torch.manual_seed(0)
    for linear in linears(wrapped).values():
        WRAPPERS[wrapper](linear)
        if wrapper == "weight_norm":
            with torch.no_grad():
                linear.parametrizations.weight.original0.mul_(1.3)
    wrapped.eval()  # spectral_norm: no power iteration
    made = {name: weight_of(linear) for name, linear in linears(wrapped).items()}
    with torch.no_grad():
        for name, linear in linears(plain).items():
            linear.weight.copy_(made[name])
    loss, wanted = (model(TEXT, labels=TEXT).loss for model in (wrapped, plain))
    assert abs(loss - wanted) < 1e-9
    wanted.backward()
    sources = [p for linear in linears(wrapped).values() for p in linear.parameters() if p.dim() > 1]
    if wrapper == "hook":
        sources = [p for linear in linears(wrapped).values() for p in linear.extra]
    found = torch.autograd.grad(loss, sources)
    below = [linears(plain)[name].weight.grad for name in made]
    for a, b in zip(found, torch.autograd.grad(list(made.values()), sources, below), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layer", [SelfModifyingLinear(6, 5, chunk_size=2), LowRankSelfModifyingMLP(6)])
def test_drop_in_layers_read_wrapped_weights(layer):
    layer = layer.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    wrapped = copy.deepcopy(layer)
    inner = {n: m for n, m in wrapped.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in inner.items():
        parametrize.register_parametrization(linear, "weight", Doubled())
        with torch.no_grad():
            layer.get_submodule(name).weight.mul_(2)
    x = torch.randn(2, 5, 6).double()
    y, wanted = wrapped(x)[0], layer(x)[0]
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    g = torch.autograd.grad(y.square().sum(), [m.parametrizations.weight.original for m in inner.values()])
    below = torch.autograd.grad(wanted.square().sum(), [layer.get_submodule(n).weight for n in inner])
    for a, b in zip(g, below, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-8, atol=1e-9)


def test_the_effective_weight_and_bias_are_the_forward_pass():
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    weight, bias = effective(linear, x)
    assert weight is linear.weight
    assert bias is linear.bias
    linear.register_forward_hook(lambda _, args, y: 2 * y + 1)
    weight, bias = effective(linear, x)
    torch.testing.assert_close(x @ weight.T + bias, linear(x))


def test_hooks_that_only_look_leave_a_layer_plain():
    """An optimizer that watches the inputs must not be shown the identity matrix."""
    layer = DeltaNet(8, 2)
    optimizer = DeltaGD(layer.parameters(), lr=0.1).attach(layer)
    assert all(is_plain(m) for m in layer.modules() if isinstance(m, nn.Linear))
    optimizer.detach()
    layer.in_proj.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(layer.in_proj)


@pytest.mark.parametrize("part", ["conv", "out_norm", "initial"])
def test_other_parts_of_a_memory_layer_under_a_parametrization(part):
    """The convolution, the norm and the initial memories are read by the layer itself."""
    torch.manual_seed(0)
    layer = DeltaNet(8, 2, chunk_size=2).double()
    wrapped = copy.deepcopy(layer)
    name = next(iter(dict(getattr(layer, part).named_parameters())))
    parametrize.register_parametrization(getattr(wrapped, part), name, Doubled())
    with torch.no_grad():
        getattr(getattr(layer, part), name).copy_(1 + torch.rand_like(getattr(getattr(layer, part), name)))
        original = getattr(wrapped, part).parametrizations[name].original
        original.copy_(getattr(getattr(layer, part), name) / 2)
    x = torch.randn(2, 5, 8).double()
    y, wanted = wrapped(x)[0], layer(x)[0]
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-12)
    (g,) = torch.autograd.grad(y.square().sum(), [original])
    (below,) = torch.autograd.grad(wanted.square().sum(), [getattr(getattr(layer, part), name)])
    torch.testing.assert_close(g, 2 * below, rtol=1e-8, atol=1e-12)
