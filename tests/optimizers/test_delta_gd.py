"""Eq 57 from collected inputs: the implicit step, its fixed point, convolutions, accumulation and AMP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nested_learning.optimizers import DeltaGD
from nested_learning.optimizers.delta_gd import input_rows


def data(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_each_step_is_the_implicit_form():
    layer = nn.Linear(5, 3, bias=False).double()
    W, x, y = layer.weight.detach().clone(), data(4, 7, 5), data(4, 7, 3, seed=1)
    with DeltaGD(layer.parameters(), lr=0.7).attach(layer) as optimizer:
        for _ in range(5):
            optimizer.zero_grad()
            loss = 0.5 * (layer(x) - y).square().sum() / 28
            loss.backward()
            optimizer.step()
            rows = x.reshape(-1, 5)
            S = sum(torch.outer(r, r) for r in rows) / 28
            G = sum(torch.outer(W @ r - t, r) for r, t in zip(rows, y.reshape(-1, 3), strict=True)) / 28
            W = (W - 0.7 * G) @ torch.linalg.inv(torch.eye(5, dtype=torch.float64) + 0.7 * S)
            close(layer.weight.detach(), W)


def test_one_input_of_unit_norm_is_eq_57():
    layer = nn.Linear(5, 3, bias=False).double()
    W, x, g = layer.weight.detach().clone(), F.normalize(data(1, 5)), data(1, 3, seed=1)
    optimizer = DeltaGD(layer.parameters(), lr=0.5).attach(layer)
    (layer(x) * g).sum().backward()
    optimizer.step()
    eta = 0.5 / 1.5
    expected = W @ (torch.eye(5, dtype=torch.float64) - eta * x.T @ x) - eta * g.T @ x
    close(layer.weight.detach(), expected)


@pytest.mark.parametrize("lr", [0.1, 1.0, 100.0])
def test_regression_ends_at_half_the_least_squares_solution(lr):
    """The minimum of L + ½E‖Wx‖², at learning rates where the explicit form diverges."""
    layer = nn.Linear(4, 2, bias=False).double()
    x, y = 3 * data(50, 4), data(50, 2, seed=1)
    with DeltaGD(layer.parameters(), lr=lr).attach(layer) as optimizer:
        for _ in range(300):
            optimizer.zero_grad()
            (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = max(0.05, optimizer.param_groups[0]["lr"] * 0.9)
    close(layer.weight.detach().T, 0.5 * torch.linalg.lstsq(x, y).solution, atol=1e-8)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "1d-unbatched-dilated": (nn.Conv1d(3, 4, 2, dilation=2), (3, 8)),
    "2d-strided": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 2, 5, 4)),
    "2d-same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 4)),
    "2d-even-same": (nn.Conv2d(2, 3, 2, padding="same"), (2, 2, 5, 4)),
    "2d-reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_patches_times_the_weight_are_the_convolution(layer, shape):
    layer = layer.double()
    x = data(*shape)
    product = input_rows(layer, x) @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    y = layer(x).detach()
    y = y.unsqueeze(0) if y.ndim == len(layer.kernel_size) + 1 else y
    close(product, y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1]))


def test_a_convolution_takes_the_same_step_as_its_unrolled_linear_layer():
    conv, linear = nn.Conv2d(2, 3, 2, bias=False).double(), nn.Linear(8, 3, bias=False).double()
    linear.weight.data = conv.weight.detach().flatten(1).clone()
    x = data(4, 2, 3, 3)
    rows = input_rows(conv, x)
    a, b = DeltaGD(conv.parameters()).attach(conv), DeltaGD(linear.parameters()).attach(linear)
    for _ in range(3):
        for layer, inputs, optimizer in ((conv, x, a), (linear, rows, b)):
            optimizer.zero_grad()
            layer(inputs).tanh().square().sum().backward()
            optimizer.step()
    close(conv.weight.detach().flatten(1), linear.weight.detach())


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def fit(model, optimizer, x, y, steps, parts=1):
    for _ in range(steps):
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.mse_loss(model(xs), ys) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_accumulated_gradients_equal_one_batch():
    x, y = data(12, 4), data(12, 3, seed=1)
    whole, pieces = network(), network()
    fit(whole, DeltaGD(whole.parameters(), lr=0.1).attach(whole), x, y, 4)
    fit(pieces, DeltaGD(pieces.parameters(), lr=0.1).attach(pieces), x, y, 4, parts=3)
    for p, q in zip(whole.parameters(), pieces.parameters(), strict=True):
        close(p.detach(), q.detach(), atol=1e-9)


def test_only_inputs_with_a_backward_count():
    x, y = data(12, 4), data(12, 3, seed=1)
    plain, disturbed = network(), network()
    a = DeltaGD(plain.parameters(), lr=0.1).attach(plain)
    b = DeltaGD(disturbed.parameters(), lr=0.1).attach(disturbed)
    for _ in range(3):
        loss = F.mse_loss(plain(x), y)
        a.zero_grad()
        loss.backward()
        a.step()
        with torch.no_grad():
            disturbed(100 * x)
        unused = disturbed(-50 * x)  # noqa: F841
        loss = F.mse_loss(disturbed(x), y)
        b.zero_grad()  # between forward and backward, as many loops do
        loss.backward()
        b.step()
        assert not b._moments
    for p, q in zip(plain.parameters(), disturbed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_inputs_of_a_pass_for_other_gradients_do_not_count():
    """Saliency, a gradient penalty, an adversarial example: no gradient of the weight is computed."""
    torch.manual_seed(0)
    start, x = torch.randn(2, 3), torch.randn(5, 3)
    other = (10 * torch.randn(7, 3)).requires_grad_()
    ends = []
    for look in (None, "grad", "backward"):
        layer = nn.Linear(3, 2, bias=False)
        layer.weight.data.copy_(start)
        with DeltaGD(layer.parameters(), lr=0.1).attach(layer) as optimizer:
            if look == "grad":
                torch.autograd.grad(layer(other).square().sum(), other)
            elif look == "backward":
                layer(other).square().sum().backward(inputs=[other])
            layer(x).square().sum().backward()
            optimizer.step()
        ends.append(layer.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_gradient_that_autograd_gives_away_counts():
    torch.manual_seed(0)
    start, x = torch.randn(2, 3), torch.randn(5, 3)
    ends = []
    for given in (False, True):
        layer = nn.Linear(3, 2, bias=False)
        layer.weight.data.copy_(start)
        with DeltaGD(layer.parameters(), lr=0.1).attach(layer) as optimizer:
            loss = layer(x).square().sum()
            if given:
                (layer.weight.grad,) = torch.autograd.grad(loss, layer.weight)
            else:
                loss.backward()
            optimizer.step()
        ends.append(layer.weight.detach())
    assert torch.equal(*ends)


def test_checkpointed_layers_count_once():
    x, y = data(12, 4), data(12, 3, seed=1)
    plain, recomputed = network(), network()
    fit(plain, DeltaGD(plain.parameters(), lr=0.1).attach(plain), x, y, 3)
    optimizer = DeltaGD(recomputed.parameters(), lr=0.1).attach(recomputed)
    forward = lambda x: torch.utils.checkpoint.checkpoint(recomputed, x, use_reentrant=False)  # noqa: E731
    fit(forward, optimizer, x, y, 3)
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        close(p.detach(), q.detach())


@pytest.mark.parametrize(("inner", "reference"), [("adam", torch.optim.Adam), ("gd", torch.optim.SGD)])
def test_other_parameters_go_to_the_inner_optimizer(inner, reference):
    x, y = data(12, 4), data(12, 3, seed=1)
    model = network()
    optimizer = DeltaGD(model.parameters(), lr=0.1, inner=inner, inner_lr_scale=0.5).attach(model)
    others = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    expected = reference(copies, lr=0.05)
    for _ in range(4):
        F.mse_loss(model(x), y).backward()
        for p, q in zip(others, copies, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        expected.step()
    for p, q in zip(others, copies, strict=True):
        close(p.detach(), q.detach())


def test_attention_and_grouped_convolutions_fall_back():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=4, padding=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            x = self.conv(x.mT).mT
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = DeltaGD(model.parameters(), lr=0.01).attach(model)
    model(data(2, 5, 4)).square().mean().backward()
    optimizer.step()
    by_inner = {name for name, p in model.named_parameters() if "mean" in optimizer.state[p]}
    assert by_inner == {name for name, _ in model.named_parameters()} - {"head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype):
    """AMP follows the float32 run, scale or not, and an overflow drops the inputs with the gradients."""
    x, y = data(64, 4, dtype=torch.float32), data(64, 3, seed=1, dtype=torch.float32)
    plain, amp = network(torch.float32), network(torch.float32)
    fit(plain, DeltaGD(plain.parameters(), lr=0.1, inner="gd").attach(plain), x, y, 5)
    optimizer = DeltaGD(amp.parameters(), lr=0.1, inner="gd").attach(amp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.mse_loss(amp(x).float(), y) * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10)
        optimizer.zero_grad()
    for p, q in zip(plain.parameters(), amp.parameters(), strict=True):
        close(p, q, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_bfloat16_weights():
    x, y = data(64, 4, dtype=torch.bfloat16), data(64, 3, seed=1, dtype=torch.bfloat16)
    model, exact = network(torch.bfloat16), network()
    fit(model, DeltaGD(model.parameters(), lr=0.1, inner="gd").attach(model), x, y, 5)
    fit(exact, DeltaGD(exact.parameters(), lr=0.1, inner="gd").attach(exact), x.double(), y.double(), 5)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        close(p.double(), q, atol=0.02)


def test_a_saved_state_continues_bit_by_bit():
    x, y = data(12, 4), data(12, 3, seed=1)
    model = network()
    optimizer = DeltaGD(model.parameters(), lr=0.1).attach(model)
    fit(model, optimizer, x, y, 3)
    other = copy.deepcopy(network())
    other.load_state_dict(model.state_dict())
    second = DeltaGD(other.parameters(), lr=0.1).attach(other)
    second.load_state_dict(optimizer.state_dict())
    fit(model, optimizer, x, y, 3)
    fit(other, second, x, y, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_hooks_go_with_the_context_also_after_an_error():
    model = network()

    def interrupted():
        with DeltaGD(model.parameters()).attach(model):
            assert model[0]._forward_hooks
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not model[0]._forward_hooks


def test_errors():
    model = network()
    optimizer = DeltaGD(model.parameters())
    model(data(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"call attach\(model\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="none of the model's 2"):
        optimizer.attach(network())
    optimizer.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        optimizer.attach(model)
    optimizer.detach()
    optimizer.attach(model)
    with pytest.raises(ValueError, match=r"Did you mean 'adam'"):
        DeltaGD(model.parameters(), inner="adamw")
