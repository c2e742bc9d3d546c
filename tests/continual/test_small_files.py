"""Memory files in bfloat16: half the size, what they cost, and that they fit 40 MB; `Learner.auto`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nested_learning.continual import AUTO, Learner, Level, reopen, stack_levels
from tests.continual.test_invariances import LEVELS, assert_equal_contents, contents, learner_on
from tests.continual.tiny_models import random_ids, tiny_model
from tests.damage import read_file

SHARE = 2.0**-8  # largest relative error of a number with 8 significant bits


def rounded(t):
    return t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t


@pytest.fixture
def files(tmp_path):
    """A learner in the middle of all its chunks, and its memory in both precisions."""
    levels = [Level(4, 0.3, rule="m3"), *LEVELS[1:]]
    learner = learner_on(tiny_model(dtype=torch.float32), levels=levels)
    learner.observe(random_ids(2, 37))
    learner.memory.save(tmp_path / "exact")
    learner.memory.save(tmp_path / "small", dtype=torch.bfloat16)
    return learner, tmp_path


def test_half_the_bytes_and_the_nearest_numbers(files):
    _, folder = files
    exact, small = read_file(folder / "exact")[0], read_file(folder / "small")[0]
    assert exact.keys() == small.keys()
    for name, t in exact.items():
        if t.is_floating_point():
            assert small[name].dtype == torch.bfloat16
            assert torch.equal(small[name], t.to(torch.bfloat16))
            assert ((small[name].double() - t.double()).abs() <= SHARE * t.double().abs()).all()
        else:
            assert torch.equal(small[name], t)
    sizes = [sum(t.nbytes for n, t in read.items() if t.is_floating_point()) for read in (exact, small)]
    assert sizes[1] * 2 == sizes[0]


def test_loaded_back_in_float32(files):
    """As the rows themselves, each number rounded; what the learner holds stays exact."""
    learner, folder = files
    loaded, exact = (learner_on(tiny_model(dtype=torch.float32), levels=learner.levels) for _ in range(2))
    loaded.memory.load(folder / "small")
    exact.memory.load(folder / "exact")
    assert_equal_contents(contents(exact), contents(learner))
    for row in (0, 1):
        places = zip(contents(loaded, row), contents(exact, row), strict=True)
        for a, b in list(places)[2:]:
            assert a.dtype == b.dtype
            # numbers of a row (losses) and steps of a rule are not rounded
            assert torch.equal(a, b) or torch.equal(a, rounded(b))
    more = random_ids(2, 30, seed=1)
    expected, found = exact.logits(more), loaded.logits(more)
    assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
    torch.testing.assert_close(loaded.observe(more), exact.observe(more), rtol=0.1, atol=0.1)


def test_what_it_costs(files):
    """The change of W is off by 2⁻⁸ of its norm at most, also as a product of rounded factors."""
    learner, folder = files
    loaded = learner_on(tiny_model(dtype=torch.float32), levels=learner.levels)
    loaded.memory.load(folder / "small")
    for name, delta in learner.memory.diff().items():
        assert (loaded.memory.diff()[name] - delta).norm() <= SHARE * delta.norm()


def assert_equal_files(first, second):
    (tensors, metadata), (others, other) = read_file(first), read_file(second)
    assert metadata == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(t, others[name]) for name, t in tensors.items())


def test_the_setting_of_a_memory(files):
    learner, folder = files
    learner.memory.file_dtype = torch.bfloat16
    learner.memory.save(folder / "setting")
    assert_equal_files(folder / "setting", folder / "small")
    twin = copy.deepcopy(learner)
    twin.memory.save(folder / "twin")
    assert_equal_files(folder / "twin", folder / "small")
    again = reopen(folder / "small", learner.model)
    assert again.memory.file_dtype == torch.bfloat16
    assert reopen(folder / "exact", learner.model).memory.file_dtype is None
    for dtype in (torch.float16, torch.float32, torch.int8):
        with pytest.raises(ValueError, match=r"exact \(None\) or in torch.bfloat16, got"):
            learner.memory.save(folder / "other", dtype=dtype)
    assert not (folder / "other").exists()


def wide(layers):
    """A Llama as wide as SmolLM2-135M, with some of its 30 layers and few tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["auto", "three levels of rank 8"])
def test_a_file_for_smollm2_fits_40_megabytes(tmp_path, kind):
    """At the end of a window of 1,024, all levels written and all sums begun: two layers stand for 30."""
    model = wide(2)
    if kind == "auto":
        learner = Learner.auto(model)
    else:
        levels = [Level(chunk, 0.01, rank=8) for chunk in (256, 384, 512)]
        learner = stack_levels(model, levels=levels)
        learner.memory.file_dtype = torch.bfloat16
    ids = torch.randint(0, 64, (1023,), generator=torch.Generator().manual_seed(0))
    learner.observe(ids)
    assert len(learner.memory.rows[0].tokens) == 1023
    learner.memory.save(tmp_path / "file")
    size = 15 * (tmp_path / "file").stat().st_size
    assert size <= 40e6
    learner.memory.file_dtype = None
    learner.memory.save(tmp_path / "exact")
    assert 15 * (tmp_path / "exact").stat().st_size > 40e6


class TestAuto:
    def test_is_the_table(self):
        learner = Learner.auto(tiny_model())
        assert learner.levels == AUTO.levels
        assert learner.memory.file_dtype == AUTO.file_dtype == torch.bfloat16

    def test_changes(self):
        learner = Learner.auto(tiny_model(), rank=2, lr=0.1, window=48, file_dtype=None)
        assert [(level.rank, level.lr, level.rule) for level in learner.levels] == [(2, 0.1, "adam")]
        assert learner.reader.plan.window == 48
        assert learner.memory.file_dtype is None
        assert Learner.auto(tiny_model(), levels=LEVELS, decay=0.3).levels[0].decay == 0.3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rnk": 2}, "unknown setting 'rnk'. Did you mean 'rank'"),
            ({"rank": 0}, "rank must be"),
            ({"window": 10**6}, "window 1000000 must"),
            ({"file_dtype": torch.float16}, "got torch.float16"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Learner.auto(tiny_model(), **changes)
