"""LowRankSelfModifyingMLP against a token loop that forms ΔW, and what its users rely on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.layers import LowRankSelfModifyingMLP
from nested_learning.layers.drop_in import LowRankMLPState

DIM = 4


def make(rank: int = 2, dtype: torch.dtype = torch.float64, **options) -> LowRankSelfModifyingMLP:
    torch.manual_seed(0)
    options = {"hidden_size": 6, "context_size": 3, "chunk_size": 4, **options}
    layer = LowRankSelfModifyingMLP(DIM, rank, **options)
    with torch.no_grad():
        layer.left.weight.normal_()
        layer.retention.weight.normal_()
        layer.retention.bias.fill_(0.5)
    return layer.to(dtype)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_tokens(layer: LowRankSelfModifyingMLP, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One row [T, dim], one token after the other, with ΔW as a matrix."""
    p = dict(layer.named_parameters())
    U = p["left.weight"].view(layer.rank, layer.dim, -1)
    V = p["right.weight"].view(layer.rank, layer.hidden_size, -1)
    outputs = []
    for x_t in x:
        alpha = (p["retention.weight"][0] @ x_t + p["retention.bias"][0]).sigmoid()
        c = alpha * c + (1 - alpha) * (p["context_proj.weight"] @ x_t)
        direction = c / (c.square().sum() + 1e-6).sqrt()
        change = torch.zeros_like(p["down.weight"])
        for i in range(layer.rank):
            change = change + torch.outer(U[i] @ direction, V[i] @ direction)
        h = F.gelu(p["up.weight"] @ x_t + p["up.bias"])
        outputs.append((p["down.weight"] + change) @ h + p["down.bias"])
    return torch.stack(outputs), c


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("T", [1, 4, 11])
def test_equals_the_token_loop_in_outputs_state_and_all_gradients(rank, T):
    layer, x = make(rank), inputs(2, T, DIM).requires_grad_()
    start = inputs(2, 3).requires_grad_()
    y, state = layer(x, LowRankMLPState(start))
    rows = [by_tokens(layer, row, c) for row, c in zip(x, start, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    torch.testing.assert_close([y, state.context], expected, atol=1e-12, rtol=1e-10)

    seeds = inputs(*y.shape), inputs(*state.context.shape)
    leaves = {"x": x, "start": start, **dict(layer.named_parameters())}
    got = torch.autograd.grad((y, state.context), list(leaves.values()), seeds)
    wanted = torch.autograd.grad(expected, list(leaves.values()), seeds)
    for name, a, b in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert a.abs().max() > 1e-6, name


def test_gradients_are_those_of_finite_differences():
    layer = make()

    def run(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        y, state = layer(x, LowRankMLPState(context))
        return y, state.context

    assert torch.autograd.gradcheck(run, (inputs(2, 5, DIM).requires_grad_(), inputs(2, 3).requires_grad_()))


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_pieces_single_tokens_and_chunk_lengths_give_the_same(chunk_size):
    layer, x = make(chunk_size=chunk_size), inputs(2, 11, DIM)
    y, state = make(chunk_size=5)(x)
    carried, pieces = None, []
    for piece in (x[:, :4], x[:, 4:10]):
        out, carried = layer(piece, carried)
        pieces.append(out)
    out, carried = layer(x[:, 10], carried)  # [B, dim]
    torch.testing.assert_close(torch.cat([*pieces, out.unsqueeze(1)], 1), y, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(carried.context, state.context, atol=1e-12, rtol=1e-10)


def test_padding_anywhere_changes_nothing_and_rows_are_independent():
    layer, x = make(), inputs(2, 7, DIM)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    y, state = layer(x.masked_fill(~mask.unsqueeze(-1), math.nan), mask=mask)
    assert not y[~mask].any()
    for row in range(2):
        alone, alone_state = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(y[row, mask[row]], alone[0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(state.context[row], alone_state.context[0], atol=1e-12, rtol=1e-10)


def test_a_token_never_changes_earlier_outputs_and_changes_all_later_ones():
    layer, x = make(), inputs(1, 8, DIM)
    changed = x.clone()
    changed[:, 3] += 1
    y, z = layer(x)[0], layer(changed)[0]
    assert torch.equal(y[:, :3], z[:, :3])
    assert (y - z)[:, 3:].abs().amax(-1).gt(1e-9).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_weight_change_is_the_one_applied_and_of_the_rank_asked_for(rank):
    layer, x = make(rank), inputs(2, 6, DIM)
    y, state = layer(x)
    change = layer.weight_change(state)
    assert torch.linalg.matrix_rank(change).tolist() == [rank, rank]
    h = F.gelu(layer.up(x[:, -1]))
    torch.testing.assert_close(y[:, -1], layer.down(h) + (change @ h.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_exactly_as_the_plain_mlp_and_can_learn(dtype):
    torch.manual_seed(0)
    layer, x = LowRankSelfModifyingMLP(8, rank=2).to(dtype), inputs(2, 20, 8).to(dtype)
    y, _ = layer(x)
    assert torch.equal(y, layer.down(F.gelu(layer.up(x))))
    y.float().square().mean().backward()
    assert layer.left.weight.grad.abs().max() > 1e-5


def test_a_late_context_changes_what_an_early_one_would_have_answered():
    """The MLP of a token differs from row to row by what the row has read, not by the token."""
    layer, x = make(), inputs(2, 9, DIM)
    x[:, -1] = x[0, -1]
    y, _ = layer(x)
    assert (y[0, -1] - y[1, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["module in bfloat16", "autocast"])
def test_the_state_stays_float32_under_bfloat16(how):
    layer, x = make(dtype=torch.float32), inputs(2, 9, DIM).float()
    expected, _ = layer(x)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(x)
    else:
        y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.context.dtype == torch.float32
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_bad_sizes_and_states_are_refused():
    for name in ("rank", "hidden_size", "context_size", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            LowRankSelfModifyingMLP(DIM, **{name: 0})
    with pytest.raises(ValueError, match=r"state.context must be \(2, 1\) on cpu, got \(3, 1\)"):
        LowRankSelfModifyingMLP(DIM)(torch.zeros(2, DIM), LowRankMLPState(torch.zeros(3, 1)))
