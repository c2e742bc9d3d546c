"""Gradients by rates and starts: against a loop of autograd, and differences of what `observe` reports."""

from __future__ import annotations

import math

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.deltas import DOWN, UP
from nested_learning.continual.files import fingerprint
from nested_learning.continual.starts.exact import exact
from nested_learning.continual.starts.first_order import first_order
from nested_learning.continual.starts.gradient import Beginning
from nested_learning.continual.starts.starts import LevelStart, Starts
from tests.continual.starts_oracle import StartsOracle, with_double_norms
from tests.continual.tiny_models import random_ids, tiny_model

MODEL = with_double_norms(tiny_model())
CASES = {
    "gd": [Level(4, 0.3), Level(8, 0.2, layers=[1], decay=0.1)],
    "momentum": [Level(4, 0.2, rule="momentum", clip=None), Level(12, 0.1, rule="momentum")],
    "adam": [Level(4, 0.02, rule="adam", layers=[0])],
    "rank": [Level(4, 0.3, rank=2, decay=0.2), Level(8, 0.2)],
    "up": [Level(4, 0.3, rank=2, learn_down=False, decay=0.1)],
}


def random_beginning(learner, seed=0):
    """Starts and rates away from zero and one, for all levels."""
    draw = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    starts, rates, learned = [], [], []
    for writer in learner.reader.writers:
        own = {}
        for target in writer.targets:
            if writer.level.rank is None:
                own[target.name] = 0.03 * noise(*target.shape)
                continue
            down, up = writer.initial_factors(target, writer.level.rank)
            own[target.name + DOWN], own[target.name + UP] = down, up + 0.1 * noise(*up.shape)
        starts.append(own)
        rates.append({slot: 0.3 * float(noise(1)) for slot in writer.keys})
        learned.append(frozenset(own.keys() & writer.keys))
    return Beginning(tuple(starts), tuple(rates), tuple(learned))


def reader_with(learner, begin):
    """A reader whose writers have the rates."""
    for writer, own in zip(learner.reader.writers, begin.log_rates, strict=True):
        writer.rates = {slot: math.exp(value) for slot, value in own.items()}
    return learner.reader


def described(levels):
    """The levels as the oracle takes them."""
    names = [name for name, _ in MODEL.named_parameters() if "mlp" in name]
    found = []
    for level in levels:
        chosen = level.layer_indices(2)
        own = [name for name in names if int(name.split(".")[2]) in chosen]
        one = {"size": level.chunk_size, "lr": level.lr, "names": own, "clip": level.clip, "rule": level.rule}
        one |= {} if level.rank is None else {"rank": level.rank, "learn_down": level.learn_down}
        found.append({**one, "decay": level.decay})
    return found


@pytest.mark.parametrize("window", [None, 15])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [first_order, exact])
def test_against_the_oracle(case, gradient, window):
    options = {} if window is None else {"window": window, "overlap": 3}
    learner = stack_levels(MODEL, levels=CASES[case], **options)
    begin = random_beginning(learner)
    ids = random_ids(30, seed=3)
    found = gradient(reader_with(learner, begin), begin, ids)
    starts = [
        {slot: t.clone().requires_grad_(slot in learned) for slot, t in own.items()}
        for own, learned in zip(begin.starts, begin.learned, strict=True)
    ]
    rates = [
        {slot: torch.tensor(value, dtype=torch.float64, requires_grad=True) for slot, value in own.items()}
        for own in begin.log_rates
    ]
    span = {} if window is None else {"window": window, "overlap": 3}
    is_exact = gradient is exact
    loss, by_start, by_rate = StartsOracle(
        MODEL, described(CASES[case]), starts, rates, is_exact, **span
    ).gradient(ids)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    for mine, theirs in zip((*found.starts, *found.log_rates), (*by_start, *by_rate), strict=True):
        assert mine.keys() == theirs.keys()
        for slot in mine:
            torch.testing.assert_close(mine[slot], theirs[slot], rtol=1e-9, atol=1e-12, msg=slot)


@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_derivative_of_what_observe_reports(case):
    """A step in a random direction of all rates and starts at once, both ways."""
    levels, ids = CASES[case], random_ids(26, seed=5)
    learner = stack_levels(MODEL, levels=levels)
    begin, way = random_beginning(learner), random_beginning(learner, seed=1)
    found = exact(reader_with(learner, begin), begin, ids)
    weights = tuple(tuple(t.name for t in w.targets) for w in learner.reader.writers)
    settings = tuple(level.describe() for level in learner.levels)

    def loss(step):
        starts = []
        for own, rates, d_own, d_rates in zip(
            begin.starts, begin.log_rates, way.starts, way.log_rates, strict=True
        ):
            moved = {s: t + step * d_own[s] if not s.endswith(DOWN) else t for s, t in own.items()}
            starts.append(LevelStart({s: math.exp(v + step * d_rates[s]) for s, v in rates.items()}, moved))
        starts = Starts(fingerprint(MODEL), settings, weights, tuple(starts))
        return float(stack_levels(MODEL, levels=levels, starts=starts).observe(ids)[1:].mean())

    assert loss(0.0) == pytest.approx(found.loss, rel=1e-12)
    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    slope = sum(
        float((g * d[slot]).sum())
        for grads, ways in ((found.starts, way.starts), (found.log_rates, way.log_rates))
        for own, d in zip(grads, ways, strict=True)
        for slot, g in own.items()
        if not (slot.endswith(DOWN) and grads is found.starts)
    )
    assert slope == pytest.approx(expected, rel=1e-5 if case == "adam" else 1e-6)


@pytest.mark.parametrize("gradient", [first_order, exact])
def test_before_the_first_write_both_are_the_plain_gradient(gradient):
    """A text no longer than a chunk: the gradient of its loss by the weights, and none by the rates."""
    learner = stack_levels(MODEL, levels=[Level(16, 0.3)])
    begin, ids = random_beginning(learner), random_ids(13)
    found = gradient(reader_with(learner, begin), begin, ids)
    weights = {name: (p + begin.starts[0].get(name, 0)).detach() for name, p in MODEL.named_parameters()}
    own = {name: weights[name].requires_grad_() for name in begin.starts[0]}
    logits = torch.func.functional_call(MODEL, weights, (ids[None],)).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    for name, plain in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
        torch.testing.assert_close(found.starts[0][name], plain, rtol=1e-9, atol=1e-12, msg=name)
    assert not any(float(g) for g in found.log_rates[0].values())
    assert learner.memory.is_empty
