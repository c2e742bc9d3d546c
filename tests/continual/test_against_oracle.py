"""The learner against a plain loop over a copied model: when, from what, by how much each level writes."""

from __future__ import annotations

import math

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.optimizers import M3
from tests.continual.oracle import Oracle
from tests.continual.tiny_models import CONFIGS, random_ids, tiny_model


def weights_of(model, layers):
    """Names of the MLP weights in these layers, spelled out independently of the library."""
    ends = ("gate_proj", "up_proj", "down_proj", "c_fc", "mlp.c_proj", "h_to_4h", "4h_to_h", "fc1", "fc2")
    names = [n for n, _ in model.named_parameters() if n.endswith(tuple(f"{end}.weight" for end in ends))]
    return [n for n in names if any(f".{layer}." in n for layer in layers)]


def assert_same(learner, oracle, surprise, expected):
    torch.testing.assert_close(surprise, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    for i, deltas in enumerate(oracle.deltas):
        found = learner.memory.diff(level=i)
        assert set(found) == {name for name, delta in deltas.items() if delta.abs().max() > 0}
        for name, delta in found.items():
            torch.testing.assert_close(delta, deltas[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("family", CONFIGS)
def test_three_levels_with_overlapping_layers(family):
    model = tiny_model(family, layers=3)
    levels = [
        Level(4, 0.3, layers=[0, 1]),
        Level(8, 0.2, layers=[1, 2], clip=0.5),
        Level(16, 0.1, layers="last third", clip=None),
    ]
    learner = stack_levels(model, levels=levels)
    names = [weights_of(model, layers) for layers in ([0, 1], [1, 2], [2])]
    oracle = Oracle(
        model, [(4, 0.3, names[0], 1.0, None), (8, 0.2, names[1], 0.5, None), (16, 0.1, names[2], None, None)]
    )
    ids = random_ids(40)
    assert_same(learner, oracle, learner.observe(ids), oracle.observe(ids))
    assert [w.position for w in learner.writes if w.level == 0] == list(range(4, 41, 4))
    assert [w.position for w in learner.writes if w.level == 1] == [8, 16, 24, 32, 40]
    assert [w.position for w in learner.writes if w.level == 2] == [16, 32]


@pytest.mark.parametrize("length", [3, 4, 5, 8, 10, 11, 24, 31])
def test_chunk_sizes_that_do_not_divide_each_other(length):
    """Boundaries of one level cut the chunks of another; texts shorter, equal and longer than chunks."""
    model = tiny_model()
    learner = stack_levels(model, levels=[Level(4, 0.3), Level(5, 0.2), Level(11, 0.1)])
    names = weights_of(model, [0, 1])
    oracle = Oracle(
        model, [(4, 0.3, names, 1.0, None), (5, 0.2, names, 1.0, None), (11, 0.1, names, 1.0, None)]
    )
    ids = random_ids(length, seed=length)
    expected = oracle.observe(ids)
    read = max([t for t in range(length + 1) if t % 4 == 0 or t % 5 == 0 or t % 11 == 0])
    assert_same(learner, oracle, learner.observe(ids)[:read], expected[:read])
    for state, sums in zip(learner.memory.rows[0].levels, oracle.sums, strict=True):
        for name, total in sums.items():
            torch.testing.assert_close(
                state.sums.get(name, torch.zeros_like(total)), total, rtol=1e-8, atol=1e-10
            )


@pytest.mark.parametrize("pieces", [[40], [3, 14, 1, 22]])
def test_only_what_the_mask_shows_is_learned(pieces):
    """All tokens are scored; sums, norms and mean losses are those of the tokens in the mask."""
    model = tiny_model()
    learner = stack_levels(model, levels=[Level(4, 0.3), Level(5, 0.2), Level(20, 0.1)], window=21, overlap=6)
    names = weights_of(model, [0, 1])
    levels = [(4, 0.3, names, 1.0, None), (5, 0.2, names, 1.0, None), (20, 0.1, names, 1.0, None)]
    oracle = Oracle(model, levels, window=21, overlap=6)
    ids, mask = random_ids(40), torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = oracle.observe(ids, mask.double())
    writes, found = [], []
    for piece, part in zip(ids.split(pieces), mask.split(pieces), strict=True):
        found.append(learner.observe(piece, learn_mask=part))
        writes += learner.writes
    assert_same(learner, oracle, torch.cat(found), expected)
    learned = torch.where(mask, expected, math.nan).view(2, 20)[:, 1:].nanmean(1)
    slow = [write.loss for write in writes if write.level == 2]
    assert slow == pytest.approx(learned.tolist())


def test_the_first_chunk_is_the_gradient_of_the_ordinary_loss():
    """Without any of the oracle's bookkeeping: Δ = −lr · clip((C − 1) ∇ mean loss)."""
    model = tiny_model("gpt2")
    ids = random_ids(6)
    learner = stack_levels(model, levels=[Level(6, 0.7)])
    learner.observe(ids)
    names = weights_of(model, [0, 1])
    loss = model(ids[None], labels=ids[None]).loss * 5
    grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
    norm = torch.cat([g.flatten() for g in grads]).norm()
    for name, g in zip(names, grads, strict=True):
        torch.testing.assert_close(learner.memory.diff()[name], -0.7 * g / norm)
    assert learner.writes[0].gradient_norm == pytest.approx(norm.item())
    assert learner.writes[0].loss == pytest.approx(loss.item() / 5)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("momentum", lambda deltas: torch.optim.SGD(deltas, lr=0.2, momentum=0.9)),
        ("adam", lambda deltas: torch.optim.Adam(deltas, lr=0.2)),
        ("rms", lambda deltas: torch.optim.Adam(deltas, lr=0.2, betas=(0.0, 0.99))),
        ("m3", lambda deltas: M3(deltas, lr=0.2)),
    ],
)
def test_inner_rules_are_the_optimizers(rule, make):
    model = tiny_model()
    learner = stack_levels(model, levels=[Level(4, 0.2, rule=rule), Level(8, 0.1)])
    names = weights_of(model, [0, 1])
    oracle = Oracle(model, [(4, 0.2, names, 1.0, make), (8, 0.1, names, 1.0, None)])
    ids = random_ids(48)
    assert_same(learner, oracle, learner.observe(ids), oracle.observe(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_windows_begin_anew_with_the_last_tokens(family):
    """Texts longer than the model's 64 positions."""
    model = tiny_model(family)
    learner = stack_levels(model, levels=[Level(4, 0.3), Level(8, 0.2)], window=21, overlap=6)
    names = weights_of(model, [0, 1])
    oracle = Oracle(model, [(4, 0.3, names, 1.0, None), (8, 0.2, names, 1.0, None)], window=21, overlap=6)
    ids = random_ids(96)
    assert_same(learner, oracle, learner.observe(ids), oracle.observe(ids))


def test_segments_shorter_than_the_fastest_chunk_sum_up():
    """A chunk of 8 read in passes of 4 is what a level that never writes at 4 would force."""
    model = tiny_model()
    names = weights_of(model, [0, 1])
    learner = stack_levels(model, levels=[Level(8, 0.3)], segment=4)
    oracle = Oracle(model, [(4, 0.0, names, 1.0, None), (8, 0.3, names, 1.0, None)])
    ids = random_ids(32)
    surprise, expected = learner.observe(ids), oracle.observe(ids)
    torch.testing.assert_close(surprise, expected, equal_nan=True)
    for name, delta in learner.memory.diff().items():
        torch.testing.assert_close(delta, oracle.deltas[1][name])


def test_named_modules_alone():
    model = tiny_model()
    learner = stack_levels(model, levels=[Level(4, 0.3)], modules=["self_attn.q_proj", "mlp.up_proj"])
    names = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "up_proj.weight"))]
    oracle = Oracle(model, [(4, 0.3, names, 1.0, None)])
    ids = random_ids(16)
    assert_same(learner, oracle, learner.observe(ids), oracle.observe(ids))
