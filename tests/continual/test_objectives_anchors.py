"""Anchors: pull of background text and decay by Fisher information, against definitions written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from nested_learning.continual import Fisher, Level, stack_levels
from tests.continual.objectives_oracle import ObjectivesOracle
from tests.continual.test_invariances import assert_equal_contents
from tests.continual.test_objectives_again import assert_learned_alike, oracle_level
from tests.continual.test_objectives_distil import everything
from tests.continual.tiny_models import VOCAB, byte_llama, random_ids, tiny_model
from tests.damage import read_file, write_checked

MODEL = tiny_model()
BACKGROUND = [random_ids(23, seed=8), random_ids(1, seed=9), random_ids(5, seed=10)]
READING = {"segment": 3, "window": 20, "overlap": 5}


@pytest.fixture(scope="module")
def fisher():
    return Fisher.of(MODEL, [random_ids(9, seed=5), random_ids(12, seed=6)], length=8)


def learner_on(levels, model=MODEL, **options):
    return stack_levels(model, levels=levels, **{**READING, **options})


def decays(level, fisher):
    return {name: (level.decay * f.double()).clamp(max=1) for name, f in fisher.diagonal.items()}


@pytest.mark.parametrize("masked", [False, True])
def test_background_text_pulls_at_each_boundary(masked):
    """Pieces in turn, shorter and longer than segments and windows; full and low-rank levels."""
    levels = [Level(4, 0.3, anchor_kl=0.5), Level(30, 0.2, rank=2, anchor_kl=2.0, clip=None)]
    learner = learner_on(levels, background=BACKGROUND)
    states = [oracle_level(learner, i, anchor=level.anchor_kl) for i, level in enumerate(levels)]
    oracle = ObjectivesOracle(MODEL, states, 3, 20, 5, background=BACKGROUND)
    ids = random_ids(32)
    mask = torch.rand(32, generator=torch.Generator().manual_seed(2)) < (0.4 if masked else 2.0)
    expected = oracle.observe(ids, mask)
    torch.testing.assert_close(learner.observe(ids, learn_mask=mask), expected, equal_nan=True)
    assert_learned_alike(learner, oracle)


def test_all_objectives_at_once(fisher):
    levels = [
        Level(4, 0.3, distill=0.5, anchor_kl=0.3, reread=1, decay=0.2),
        Level(10, 0.2, layers=[1], reread=1, anchor_kl=1.0),
        Level(20, 0.2, rank=2, distill=1.0, anchor_kl=0.5, reread=2),
    ]
    learner = learner_on(levels, background=BACKGROUND, fisher=fisher, distill_top_k=5)
    states = [
        oracle_level(learner, i, distill=level.distill, anchor=level.anchor_kl)
        for i, level in enumerate(levels)
    ]
    states[0].decay = decays(levels[0], fisher)
    oracle = ObjectivesOracle(MODEL, states, 3, 20, 5, top_k=5, background=BACKGROUND)
    ids = random_ids(40)
    expected = oracle.observe(ids)
    torch.testing.assert_close(learner.observe(ids), expected, equal_nan=True)
    assert_learned_alike(learner, oracle)


def test_the_diagonal_is_the_mean_of_squared_gradients_with_mean_one(fisher):
    sequences = [random_ids(9, seed=5)[:8], *random_ids(12, seed=6).split(8)]
    squares = dict.fromkeys(fisher.diagonal, 0.0)
    assert set(squares) == {n for n, _ in MODEL.named_parameters() if "mlp" in n}
    for ids in sequences:
        loss = MODEL(ids[None], labels=ids[None]).loss * (len(ids) - 1)
        found = torch.autograd.grad(loss, [MODEL.get_parameter(name) for name in squares])
        for name, g in zip(squares, found, strict=True):
            squares[name] = squares[name] + g.square() / len(sequences)
    mean = torch.cat([square.flatten() for square in squares.values()]).mean()
    for name, square in squares.items():
        torch.testing.assert_close(fisher.diagonal[name].double(), square / mean, rtol=4e-3, atol=0.0)
    rooted = fisher.rooted().diagonal
    roots = torch.cat([square.sqrt().flatten() for square in squares.values()]).mean()
    for name, square in squares.items():
        torch.testing.assert_close(rooted[name].double(), square.sqrt() / roots, rtol=1e-2, atol=0.0)
    assert all(p.grad is None for p in MODEL.parameters())


def test_frozen_weights_stay_frozen_and_give_the_same(fisher):
    model = tiny_model().requires_grad_(False)
    found = Fisher.of(model, [random_ids(9, seed=5), random_ids(12, seed=6)], length=8)
    assert found.digest == fisher.digest
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rule", ["gd", "momentum"])
def test_weights_are_forgotten_by_their_share(fisher, rule):
    """Two writes whose gradients are too small to count leave what the shares leave."""
    level = Level(4, 1e-30, decay=0.4, rule=rule)
    learner = learner_on([level], fisher=fisher)
    learner.observe(random_ids(4))  # a first write, so that there is a delta
    name = next(iter(fisher.diagonal))
    state = learner.memory.rows[0].levels[0]
    before = torch.randn_like(state.deltas[name])
    state.deltas[name] = before.clone()
    learner.observe(random_ids(8, seed=1))
    share = (0.4 * fisher.diagonal[name].double()).clamp(max=1)
    assert (share == 1).any()
    assert (share < 0.01).any()
    expected = before * (1 - share) ** 2
    torch.testing.assert_close(learner.memory.diff()[name], expected, rtol=1e-9, atol=1e-12)


def test_a_diagonal_of_ones_is_the_plain_decay(fisher):
    ones = Fisher({n: torch.ones_like(f) for n, f in fisher.diagonal.items()}, fisher.fingerprint)
    scaled, plain = (
        learner_on([Level(4, 0.3, decay=0.25)], fisher=ones),
        learner_on([Level(4, 0.3, decay=0.25)]),
    )
    scaled.observe(random_ids(16))
    plain.observe(random_ids(16))
    assert_equal_contents(everything(scaled), everything(plain))


def test_rows_scopes_copies_and_files_go_on_alike(tmp_path, fisher):
    levels = [Level(4, 0.3, anchor_kl=0.5, decay=0.2), Level(8, 0.2, rank=2, anchor_kl=1.0)]
    first, more = random_ids(2, 13), random_ids(2, 9, seed=1)
    learner, alone = (learner_on(levels, background=BACKGROUND, fisher=fisher) for _ in range(2))
    learner.observe(first)
    alone.observe(first[0][:6])
    alone.observe(first[0][6:])
    before = everything(learner)
    with learner.adaptation_scope():
        learner.observe(more)
    assert_equal_contents(everything(learner), before)
    learner.memory.save(tmp_path / "memory")
    loaded = learner_on(levels, background=BACKGROUND, fisher=fisher)
    loaded.memory.load(tmp_path / "memory")
    expected = learner.observe(more)
    assert torch.equal(loaded.observe(more), expected)
    assert_equal_contents(everything(loaded), everything(learner))
    for other in (alone, copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        torch.testing.assert_close(other.observe(more[0]), expected[0])
    refused = {
        "this learner has the background": {"background": BACKGROUND[:1], "fisher": fisher},
        "this learner has the fisher": {"background": BACKGROUND, "fisher": fisher.rooted()},
        "this learner has no fisher": {"background": BACKGROUND},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            learner_on(levels, **options).memory.load(tmp_path / "memory")


def test_a_fisher_file_is_what_was_saved_or_refused(tmp_path, fisher):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = Fisher.load(path)
    assert loaded.fingerprint == fisher.fingerprint
    assert loaded.digest == fisher.digest
    learner_on([Level(4, 0.3, decay=0.2)], fisher=loaded)
    tensors, metadata = read_file(path)
    name = next(iter(tensors))
    for wrong in (-tensors[name], tensors[name].double(), tensors[name] * float("nan")):
        write_checked(path, {**tensors, name: wrong}, metadata)
        with pytest.raises(ValueError, match=r"is damaged: .* expected bfloat16 numbers from 0"):
            Fisher.load(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors"):
        Fisher.load(path)
    learner = learner_on([Level(4, 0.3)])
    learner.memory.save(path)
    with pytest.raises(ValueError, match="is no Fisher diagonal"):
        Fisher.load(path)
    with pytest.raises(FileNotFoundError, match="no Fisher file"):
        Fisher.load(tmp_path / "none")


def test_background_as_text_and_its_budget():
    model, tokenizer = byte_llama(16, 24, 1)
    fisher = Fisher.of(model, "Some text of before.", tokenizer)
    levels = [Level(8, 0.1, anchor_kl=1.0, decay=0.1)]
    learner = stack_levels(model, tokenizer, levels=levels, background=["Old.", "Older."], fisher=fisher)
    learner.observe("A text of some length.")
    assert len(learner.writes) == 2
    parameters = sum(p.numel() for n, p in model.named_parameters() if "mlp" in n)
    assert learner.info().anchors == 2 * parameters
    plain = stack_levels(model, tokenizer, levels=[Level(8, 0.1)]).info()
    assert learner.info().total == plain.total + 2 * parameters


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ({"anchor_kl": -1.0}, {}, "anchor_kl must be a finite number >= 0"),
        ({"lr": 0.0, "anchor_kl": 1.0}, {}, "anchor_kl is 1.0, but with lr=0 the level learns nothing"),
        ({"anchor_kl": 1.0}, {}, "there is no background: give stack_levels a text"),
        ({}, {"background": [[1, 2]]}, "no level has anchor_kl"),
        ({"anchor_kl": 1.0}, {"background": [[1], [2]]}, "no text of two tokens"),
        ({"anchor_kl": 1.0}, {"background": [[1, VOCAB]]}, "ids must be from 0 to 60, got 61"),
        ({}, {"fisher": "fisher"}, "no level has a decay"),
        ({"decay": 0.1, "rank": 2}, {"fisher": "fisher"}, "a delta of rank 2 cannot follow"),
        ({"decay": 0.1}, {"fisher": "other"}, "fisher belongs to another base model"),
        ({"decay": 0.1}, {"fisher": "x"}, "fisher must be a Fisher, made by"),
        (
            {"decay": 0.1},
            {"fisher": "fisher", "modules": ["q_proj"]},
            "learns .*q_proj.*, where fisher has None",
        ),
    ],
)
def test_refusals(fisher, level, options, message):
    given = {"fisher": fisher, "other": Fisher(fisher.diagonal, "0" * 64)}
    if "fisher" in options:
        options = {**options, "fisher": given.get(options["fisher"], options["fisher"])}
    with pytest.raises(ValueError, match=message):
        learner_on([Level(**{"chunk_size": 4, "lr": 0.1, **level})], **options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[1], [2]], {}, "no text of two tokens"),
        ([1, 2, 3], {"length": 1}, "length must be a finite whole number >= 2"),
        ([1, 2, 3], {"length": 65}, "length is 65, but the model has 64 positions"),
        ("text", {}, "there is no tokenizer"),
    ],
)
def test_refused_backgrounds_of_a_diagonal(ids, options, message):
    with pytest.raises(ValueError, match=message):
        Fisher.of(MODEL, ids, **{"length": 8, **options})
