"""The oracle against facts that need no implementation: closed forms, fixed points, finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from . import memory_layer as oracle

ZERO = torch.zeros((), dtype=torch.float64)
SELF = partial(oracle.self_modifying_titans, num_heads=2, chunk_size=4, projection_chunk_size=2, eta_max=0.5)
STATIC = partial(oracle.titans, num_heads=2, chunk_size=4, eta_max=0.5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit_vector(n: int, seed: int) -> Tensor:
    u = normal(n, seed=seed)
    return u / u.norm()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def one_memory(seed: int, chunk: int, momentum: bool = False) -> oracle.Memory:
    W1, W2 = 0.3 * normal(4, 6, seed=seed), normal(6, 4, seed=seed + 1)
    S1, S2 = (torch.zeros_like(W1), torch.zeros_like(W2)) if momentum else (None, None)
    return oracle.Memory(W1, W2, W1, W2, S1, S2, initial_W2=W2, chunk=chunk)


def write_repeatedly(
    memory: oracle.Memory, k: Tensor, target: Tensor, times: int, **options
) -> oracle.Memory:
    log_mu = None if memory.S1 is None else torch.tensor(0.9, dtype=torch.float64).log()
    token = oracle.Token(k=k, q=k, targets={}, eta=ZERO + 0.5, log_alpha=ZERO, log_mu=log_mu)
    for position in range(1, times + 1):
        memory = oracle.at_boundary(oracle.update(memory, token, target, **options), position)
    return memory


def test_a_write_is_the_proximal_step_of_dgd():
    """Eq 56-57: it minimises ½‖Wx + g‖² + (1/2η)‖W − W_t‖² for unit x, at the rate η/(1 + η)."""
    W, x, g, eta = normal(3, 5), unit_vector(5, seed=1), normal(3, seed=2), 0.7
    rate = torch.tensor(eta / (1 + eta), dtype=torch.float64)
    new, _ = oracle.evolve(W, None, x, -rate * g, ZERO, erase=rate)
    new = new.requires_grad_()
    objective = 0.5 * (new @ x + g).square().sum() + (new - W).square().sum() / (2 * eta)
    (slope,) = torch.autograd.grad(objective, new)
    close(slope, torch.zeros_like(slope))


def test_retention_pulls_towards_the_origin_it_is_given():
    W, W_init, x = normal(3, 5), normal(3, 5, seed=1), unit_vector(5, seed=2)
    still, half = torch.zeros(3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64).log()
    close(oracle.evolve(W, None, x, still, half)[0], W / 2)
    close(oracle.evolve(W, None, x, still, half, W_init=W_init)[0], (W + W_init) / 2)


def test_momentum_is_a_geometric_sum_of_writes():
    W, x, a, mu = torch.zeros(3, 5, dtype=torch.float64), unit_vector(5, seed=1), normal(3), 0.8
    log_mu = torch.tensor(mu, dtype=torch.float64).log()
    for scaled, total in ((True, 1 - mu**4), (False, (1 - mu**4) / (1 - mu))):
        S: Tensor | None = torch.zeros_like(W)
        for _ in range(4):
            _, S = oracle.evolve(W, S, x, a, ZERO, log_mu=log_mu, scaled=scaled)
        assert S is not None
        close(S, total * torch.outer(a, x))


@pytest.mark.parametrize("momentum", [False, True])
def test_dgd_fixed_point_of_a_repeated_key_is_the_residual_target(momentum):
    k, target = unit_vector(4, seed=3), unit_vector(4, seed=4)
    memory = write_repeatedly(one_memory(5, 10**6, momentum), k, target, 600, rule="dgd", scaled=True)
    x1 = oracle.inner_gradients(memory.anchor_W1, memory.anchor_W2, k, target).x1
    close(memory.W1 @ x1, target - k, 1e-8)


def test_dgd_memory_answers_with_the_target_once_chunks_follow_each_other():
    k, target = unit_vector(4, seed=3), unit_vector(4, seed=4)
    memory = write_repeatedly(one_memory(5, chunk=3), k, target, 300, rule="dgd", scaled=True)
    close(memory.now(k), target, 1e-8)


def test_literal_fixed_points():
    """Spec section 2: with the L2 gradient, per token t/2; from an anchor W_a, t − W_a x."""
    x, t, rate = unit_vector(5, seed=1), normal(3, seed=2), torch.tensor(0.5, dtype=torch.float64)
    anchor = W = normal(3, 5)
    for _ in range(200):
        W, _ = oracle.evolve(W, None, x, -rate * (W @ x - t), ZERO, erase=rate)
    close(W @ x, t / 2)
    W = anchor
    for _ in range(200):
        W, _ = oracle.evolve(W, None, x, -rate * (anchor @ x - t), ZERO, erase=rate)
    close(W @ x, t - anchor @ x)


def test_literal_rule_has_the_anchor_fixed_point_in_its_first_matrix():
    k, target = unit_vector(4, seed=3), unit_vector(4, seed=4)
    start = one_memory(5, chunk=10**6)
    memory = write_repeatedly(start, k, target, 400, rule="dgd_literal", scaled=True)
    x1 = oracle.inner_gradients(start.W1, start.W2, k, target).x1
    close(memory.W1 @ x1, (target - k) - start.W1 @ x1, 1e-9)


def test_gd_write_is_a_gradient_step_on_the_first_matrix():
    k, target = unit_vector(4, seed=3), unit_vector(4, seed=4)
    start = one_memory(5, chunk=10**6)
    W1 = start.W1.clone().requires_grad_()
    loss = 0.5 * (oracle.answer(W1, start.W2, k) - target).square().sum()
    (slope,) = torch.autograd.grad(loss, W1)
    memory = write_repeatedly(start, k, target, 1, rule="gd", scaled=True)
    close(memory.W1.detach(), start.W1 - 0.5 * slope)


def test_inner_gradient_is_the_finite_difference_of_the_loss():
    W1, W2, k, target = normal(4, 6), normal(6, 4, seed=1), unit_vector(4, seed=2), unit_vector(4, seed=3)
    g = oracle.inner_gradients(W1, W2, k, target)
    step = 1e-6

    def loss_with(delta_z1: Tensor, delta_z2: Tensor) -> Tensor:
        x1 = oracle.hidden_norm(torch.nn.functional.silu(W2 @ k + delta_z2))
        return 0.5 * (k + W1 @ x1 + delta_z1 - target).square().sum()

    def slope(size: int, which: int) -> Tensor:
        columns = []
        for axis in torch.eye(size, dtype=torch.float64) * step:
            at = [torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
            at[which] = axis
            columns.append((loss_with(*at) - loss_with(-at[0], -at[1])) / (2 * step))
        return torch.stack(columns)

    close(g.g1.detach(), slope(4, which=0), 1e-8)
    close(g.g2.detach(), slope(6, which=1), 1e-8)


@pytest.mark.parametrize("norm", [0.3, 1.0, 7.0])
def test_clip_shortens_only_what_is_longer_than_one(norm):
    direction = unit_vector(6, seed=1)
    close(oracle.clip(norm * direction), min(norm, 1.0) * direction)


def scalar_of(layer, params: dict[str, Tensor], x: Tensor, **options) -> Tensor:
    y, state, _ = layer(params, x, **options)
    total = (y * normal(*y.shape, seed=11)).sum()
    for seed, part in enumerate(("current", "anchor")):
        for name in ("W1", "W2"):
            weight = state[part][name]
            total = total + (weight * normal(*weight.shape, seed=20 + seed)).sum()
    return total


@pytest.mark.parametrize("rule", oracle.RULES)
@pytest.mark.parametrize("self_modifying", [True, False])
def test_outer_gradient_is_the_derivative_of_the_whole_run(self_modifying, rule):
    """Nothing on the way is cut: not the targets, not the anchors, not the gates."""
    layer = SELF if self_modifying else STATIC
    params = oracle.random_params(self_modifying=self_modifying, momentum=True, seed=1)
    leaves = {"x": normal(1, 6, 8, seed=2), **params}

    def run(values: dict[str, Tensor]) -> Tensor:
        rest = {name: value for name, value in values.items() if name != "x"}
        return scalar_of(layer, rest, values["x"], rule=rule, momentum=True)

    graph = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    slopes = torch.autograd.grad(run(graph), list(graph.values()))
    for (name, value), slope in zip(leaves.items(), slopes, strict=True):
        direction = 1e-5 * normal(*value.shape, seed=3)
        up, down = ({**leaves, name: value + sign * direction} for sign in (1, -1))
        measured = (run(up) - run(down)).detach() / 2
        expected = (slope * direction).sum()
        assert abs(measured - expected) <= 1e-6 * abs(expected) + 1e-12, name


@pytest.mark.parametrize("layer_name", ["self", "static"])
@pytest.mark.parametrize("read", ["token", "chunk"])
def test_causality(layer_name, read):
    layer = SELF if layer_name == "self" else STATIC
    params = oracle.random_params(self_modifying=layer_name == "self")
    x = normal(1, 9, 8)
    y, _, surprise = layer(params, x, read=read)
    for t in range(1, 9):
        changed = torch.cat([x[:, :t], normal(1, 9 - t, 8, seed=50 + t)], dim=1)
        y_changed, _, surprise_changed = layer(params, changed, read=read)
        assert torch.equal(y_changed[:, :t], y[:, :t])
        assert torch.equal(surprise_changed[:, :t], surprise[:, :t])
        assert not torch.isclose(y_changed[:, t], y[:, t]).all()


def test_padding_is_as_if_the_token_were_not_there():
    params = oracle.random_params(momentum=True)
    x = normal(1, 7, 8)
    y, state, surprise = SELF(params, x, momentum=True)
    for real in ([0, 0, 0, *[1] * 7], [1, 1, 0, 1, 0, 0, *[1] * 4]):
        mask = torch.tensor([real], dtype=torch.bool)
        padded = normal(1, 10, 8, seed=9).masked_scatter(mask[..., None], x)
        y_padded, state_padded, surprise_padded = SELF(params, padded, momentum=True, mask=mask)
        assert torch.equal(y_padded[mask], y[0])
        assert torch.equal(surprise_padded[mask], surprise[0])
        assert not y_padded[~mask].any()
        assert not surprise_padded[~mask].any()
        assert torch.equal(state_padded["position"], state["position"])
        assert torch.equal(state_padded["conv_tail"], state["conv_tail"])
        for part in ("current", "anchor", "momentum"):
            assert torch.equal(state_padded[part]["W1"], state[part]["W1"])
            assert torch.equal(state_padded[part]["W2"], state[part]["W2"])


def test_pieces_make_the_whole():
    params = oracle.random_params(momentum=True, adaptive="kvq")
    x = normal(2, 9, 8)
    run = partial(SELF, momentum=True, adaptive="kvq")
    y, final, surprise = run(params, x)
    state, outputs, surprises = None, [], []
    for piece in x.split([1, 4, 1, 3], dim=1):
        y_piece, state, surprise_piece = run(params, piece, state=state)
        outputs.append(y_piece)
        surprises.append(surprise_piece)
    assert torch.equal(torch.cat(outputs, dim=1), y)
    assert torch.equal(torch.cat(surprises, dim=1), surprise)
    assert state is not None
    assert torch.equal(state["current"]["W1"], final["current"]["W1"])
    assert torch.equal(state["position"], torch.tensor([1, 1]))


def test_convolution_is_torch_conv1d():
    weight, p = normal(6, 1, 4), normal(5, 6, seed=1)
    padded = torch.nn.functional.pad(p.T[None], (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight, groups=6)[0].T
    history = [torch.zeros(6, dtype=torch.float64) for _ in range(3)]
    for t in range(5):
        close(oracle.causal_conv(weight, history, p[t]), expected[t])
        history = [*history, p[t]][1:]


def test_anchors_follow_their_own_chunk_length():
    """Projections every 2 tokens, memory every 4: after 6 tokens only the memory has unread writes."""
    params = oracle.random_params()
    _, state, _ = SELF(params, normal(1, 6, 8))
    equal = (state["current"]["W1"] == state["anchor"]["W1"]).flatten(2).all(-1)[0]
    assert equal.tolist() == [True, True, True, True, False]
    start = params["initial.W1"]
    _, state, _ = SELF(params, normal(1, 3, 8))
    assert torch.equal(state["anchor"]["W1"][0, -1], start[-1])
    assert not torch.isclose(state["anchor"]["W1"][0, 0], start[0]).all()
