"""What a cache learns in an adaptation scope is undone on leaving, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nested_learning import HopeCache
from nested_learning.models.hope import HopeModel
from tests.models.small_models import small_model

LM = {"cms_update": "lm", "cms_levels": [{"chunk_size": 2}, {"chunk_size": 4, "rule": "adam"}]}


@pytest.fixture(params=["none", "regression", "lm"])
def model(request, mixers):
    return small_model(mixers, **(LM | {"cms_update": request.param} if request.param != "none" else {}))


@pytest.fixture
def cache(model, ids):
    with torch.no_grad():
        return model(ids[:, :5], use_cache=True).past_key_values


def content(cache: HopeCache) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a cache by name."""
    found = {"tokens_seen": cache.tokens_seen, "prefix_hash": cache.prefix_hash}
    for name, state in cache.states.items():
        found |= {f"{name}/{field}": t for field, t in state.to_tensors().items()}
    return {name: t.clone() for name, t in found.items()}


def assert_as_before(cache, before, columns=5):
    after = content(cache)
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert cache.get_seq_length() == columns


@torch.no_grad()
def test_undone_on_leaving(model, ids, cache):
    before = content(cache)
    expected = model(ids[:, 5:], past_key_values=cache.clone()).logits
    with model.adaptation_scope(cache) as same:
        assert same is cache
        read = model(ids[:, 5:], past_key_values=cache).logits
        assert torch.equal(read, expected)  # inside it learns as it does outside
        assert cache.get_seq_length() == 13
        assert any(not torch.equal(t, before[name]) for name, t in content(cache).items() if name in before)
    assert_as_before(cache, before)
    assert torch.equal(model(ids[:, 5:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_undone_after_an_exception(model, ids, cache):
    before = content(cache)

    def read_and_fail():
        with model.adaptation_scope(cache):
            model(ids, past_key_values=cache)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        read_and_fail()
    assert_as_before(cache, before)


@torch.no_grad()
def test_nested_scopes(model, ids, cache):
    before = content(cache)
    with model.adaptation_scope(cache):
        model(ids[:, 5:9], past_key_values=cache)
        inner = content(cache)
        with cache.adaptation_scope():
            model(ids[:, 9:], past_key_values=cache)
            kept = cache.clone()
        assert_as_before(cache, inner, 9)
        assert kept.get_seq_length() == 13  # a clone stays
    assert_as_before(cache, before)


@torch.no_grad()
def test_nothing_is_copied(model, ids, cache):
    tensors = [t.data_ptr() for state in cache.states.values() for t in state.tensors()]
    with model.adaptation_scope(cache):
        model(ids[:, 5:], past_key_values=cache)
    assert [t.data_ptr() for state in cache.states.values() for t in state.tensors()] == tensors


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_inside(model, ids, cache, options):
    before = content(cache)
    call = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, **options}
    torch.manual_seed(0)
    expected = model.generate(ids[:, 5:8], past_key_values=cache.clone(), **call)
    torch.manual_seed(0)
    with model.adaptation_scope(cache):
        assert torch.equal(model.generate(ids[:, 5:8], past_key_values=cache, **call), expected)
    assert_as_before(cache, before)


@torch.no_grad()
def test_guesses_and_crop_inside(ids):
    """A cache that records for speculative decoding records afterwards what it did before."""
    model = small_model(["titans"])
    cache = model(ids[:1, :5], use_cache=True).past_key_values
    before = content(cache)
    with model.adaptation_scope(cache):
        model.generate(ids[:1, 5:9], past_key_values=cache, prompt_lookup_num_tokens=2, max_new_tokens=4)
        cache.activate_past_recording()
        model(ids[:1, 5:8], past_key_values=cache)
    assert cache.recording is None
    assert_as_before(cache, before)
    cache.activate_past_recording()
    model(ids[:1, 5:8], past_key_values=cache)
    with model.adaptation_scope(cache):
        model(ids[:1, 8:], past_key_values=cache)
        cache.crop(-6)
    assert cache.get_seq_length() == 8
    cache.crop(-3)
    assert_as_before(cache, before)


def test_gradients_of_a_scope_are_those_without_it(ids):
    """The states go on being part of the graph."""
    model = small_model(["self_modifying_titans"])
    grads = []
    for scoped in (True, False):
        cache = model(ids[:, :5], use_cache=True).past_key_values
        if scoped:
            with cache.adaptation_scope():
                model(ids, past_key_values=cache)
        loss = model(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).loss
        grads.append(torch.autograd.grad(loss, model.parameters(), allow_unused=True))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_without_a_cache_it_begins_and_ends_empty(ids):
    model = small_model(["titans"])
    with model.adaptation_scope() as cache:
        out = model(ids, past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.batch_size == 3
    assert cache.batch_size is None
    assert cache.states == {}
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_model_without_a_head(ids):
    model = HopeModel(small_model(["titans"]).config).double().eval()
    with model.adaptation_scope() as cache:
        model(ids, past_key_values=cache)
    assert cache.batch_size is None


@torch.no_grad()
def test_refusals(ids):
    model, other = small_model(["titans"]), small_model(["titans"], num_heads=1)
    out = model(ids, use_cache=True)
    for wrong in (out, ids, "cache"):
        with pytest.raises(ValueError, match="takes the HopeCache"), model.adaptation_scope(wrong):
            pytest.fail("entered")
    with (
        pytest.raises(ValueError, match="another configuration"),
        other.adaptation_scope(out.past_key_values),
    ):
        pytest.fail("entered")
