"""Mechanism: rows that differ in what their name says, equal parameters, one trial, claims."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from math import prod

import pytest
import torch

from nested_learning.evals import MethodRow, find_method
from nested_learning.evals.claims import DOES_NOT, HOLDS, UNTOLD
from nested_learning.evals.methods.mechanism import GRID, MORE
from nested_learning.evals.methods.models import Size, TrainedModel
from nested_learning.evals.tasks.mechanism import Mechanism
from nested_learning.layers import SelfModifyingTitans
from nested_learning.layers.memory.layer import MemoryLayer

SIZE = Size(64, 64, 32, 1, 2)


def _layer(method: TrainedModel) -> MemoryLayer:
    size = dataclasses.replace(SIZE, mlp=False)  # whose parameters need not be matched
    with torch.device("meta"):
        return next(m for m in method.new_model(size, 0).modules() if isinstance(m, MemoryLayer))


def test_rows_differ_from_the_first_in_what_their_names_say():
    layers = {method.name.removeprefix("mechanism-"): _layer(method) for method in (*GRID, *MORE)}
    whole = layers["whole"].system
    assert whole == SelfModifyingTitans(32, 2, chunk_size=32, momentum=True).system
    fields = [field.name for field in dataclasses.fields(whole) if field.compare]
    differ = {
        name: {field for field in fields if getattr(layer.system, field) != getattr(whole, field)}
        for name, layer in layers.items()
    }
    assert differ == {
        "whole": set(),
        "static": {"generated", "self_targets"},
        "given-targets": {"self_targets"},
        "static-k-v": {"generated"},
        "adaptive-q": {"generated"},
        "no-momentum": {"momentum"},
        "one-level": set(),
        "linear": differ["linear"],
        "three-levels": set(),
        "in-context": set(),
        "static-gates": {"generated"},
        "ungated": {"generated", "rate"},
    }
    counts = {name: len(layer.system.memories) for name, layer in layers.items()}
    assert [counts[name] for name in ("static", "static-k-v", "whole", "adaptive-q")] == [1, 3, 5, 6]


def test_the_linear_memory_is_exact_and_as_large_as_the_one_that_is_read_out():
    whole, linear = _layer(find_method("mechanism-whole")), _layer(find_method("mechanism-linear"))
    assert linear.system.exact
    assert linear.system.gates == ("eta", "alpha")
    read_out = sum(prod(W.shape[1:]) for W in whole.initial.values())  # [memories, heads, out, in]
    assert sum(W.numel() for W in linear.initial.values()) == read_out == 32 * 32


def test_levels_of_the_rows_and_their_periods():
    sizes = {
        "one-level": [32],
        "whole": [8, 32],
        "three-levels": [8, 16, 32],
        "in-context": [8, 32],
    }
    for name, chunks in sizes.items():
        method = find_method(f"mechanism-{name}")
        config = method.config(SIZE)
        assert [level["chunk_size"] for level in config.cms_levels] == chunks
        assert config.cms_update == ("regression" if name == "in-context" else "none")
    method = find_method("mechanism-three-levels")
    model = method.new_model(SIZE, 0)
    optimizer = method.optimizer(model, 1e-3, 0.1)
    named = {
        level: [p for name, p in model.named_parameters() if f".cms.blocks.{level}." in name]
        for level in range(3)
    }
    before = {level: [p.detach().clone() for p in ps] for level, ps in named.items()}
    moved: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(1, 17):
        model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for level, ps in named.items():
            if any(not torch.equal(p, b) for p, b in zip(ps, before[level], strict=True)):
                moved[level].append(step)
            before[level] = [p.detach().clone() for p in ps]
    assert all(named.values())
    assert moved == {0: list(range(1, 17)), 1: [4, 8, 12, 16], 2: [16]}


@pytest.mark.parametrize("longest", [20, 36, 63])
def test_each_chunk_divides_the_next_and_the_longest_sequence_holds_two_of_the_slowest(longest):
    for levels in (2, 3):
        method = TrainedModel("row", "self_modifying_titans", levels="periods", num_levels=levels)
        chunks = [level["chunk_size"] for level in method.config(Size(16, longest, 32, 1, 2)).cms_levels]
        assert all(slow % fast == 0 for fast, slow in pairwise(chunks))
        assert 2 * chunks[-1] <= longest


def test_rows_have_equally_many_parameters():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in method.new_model(SIZE, 0).parameters()) for method in (*GRID, *MORE)]
    assert max(counts) <= 1.01 * min(counts)


def test_parity_is_trained_with_inner_rates_that_can_flip_a_sign():
    task = Mechanism.at("small")
    bounds = {each.name: _layer(task.for_parity(each)).system.eta_max for each in (*GRID, *MORE)}
    del bounds["mechanism-ungated"]  # its rate is always the same
    assert set(bounds.values()) == {2.0}
    assert max(_layer(each).system.eta_max for each in GRID) == 1.0  # recall and language


def test_a_trial_follows_from_its_seed_and_has_language_on_the_first_seeds():
    task = Mechanism.at("smoke")
    method = find_method("mechanism-linear")
    figures = task.run(method, 0)
    assert {**figures, "seconds": 0} == {**task.run(method, 0), "seconds": 0}
    assert figures["nats"] == figures["nats@16"]
    assert 4 < figures["nats"] < 7  # two steps from random weights: about ln 256
    assert figures["memories"] == 1
    assert "nats" not in task.run(method, 1)
    assert task.tune(method, 1000).keys() == {"nats", "nats@16"}


def test_claims_are_judged_by_the_seeds_that_both_rows_have():
    def row(name: str, nats: float, parity: float) -> MethodRow:
        figures = {seed: {"parity bin 1": parity + seed / 100, "recall": 0.2} for seed in range(5)}
        for seed in range(3):
            figures[seed]["nats"] = nats + seed / 10
        return MethodRow(name, {}, figures)

    names = {method.name for method in GRID}
    rows = {name: row(name, 2.0 + 0.1 * (name != "mechanism-whole"), 0.5) for name in names}
    rows["mechanism-adaptive-q"] = row("mechanism-adaptive-q", 1.9, 0.5)
    verdicts = {claim.text: claim.judge(rows).verdict for claim in Mechanism.at("small").claims()}
    assert verdicts.pop("(6) adaptive q does not help (nats per byte)") == DOES_NOT
    told = [verdict for text, verdict in verdicts.items() if "nats" in text]
    assert set(told) == {HOLDS}
    assert len(told) == 5
    assert {verdict for text, verdict in verdicts.items() if "nats" not in text} == {UNTOLD}
