"""HopeCache: branching, rows, devices, and its file."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nested_learning import HopeCache
from tests.models.small_models import small_model

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def cache(model, ids):
    """After six tokens per row, of which row 1 has four real ones."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    return model(ids[:, :6], attention_mask=mask).past_key_values


def rest(model, ids, cache):
    return model(ids[:, 6:], past_key_values=cache).logits


def test_a_call_advances_the_cache_it_is_given_and_a_clone_stays(model, ids, cache):
    branch = cache.clone()
    out = model(ids[:, 6:], past_key_values=cache)
    assert out.past_key_values is cache
    assert cache.tokens_seen.tolist() == [13, 11, 13]
    assert cache.get_seq_length() == 13
    assert branch.tokens_seen.tolist() == [6, 4, 6]
    assert branch.get_seq_length() == 6
    assert torch.equal(rest(model, ids, branch), out.logits)


def test_rows(model, ids, cache):
    expected = rest(model, ids, cache.clone())
    order = torch.tensor([2, 0, 0, 1])
    got = rest(model, ids[order], cache.select_rows(order))
    torch.testing.assert_close(got, expected[order], **EXACT)
    assert cache.batch_size == 3

    repeated = cache.clone()
    repeated.batch_repeat_interleave(2)
    got = rest(model, ids.repeat_interleave(2, 0), repeated)
    torch.testing.assert_close(got, expected.repeat_interleave(2, 0), **EXACT)

    reordered = cache.clone()
    reordered.reorder_cache(torch.tensor([1, 1, 0]))
    assert reordered.tokens_seen.tolist() == [4, 4, 6]
    got = rest(model, ids[[1, 1, 0]], reordered)
    torch.testing.assert_close(got, expected[[1, 1, 0]], **EXACT)


def test_detach_cuts_the_graph_and_keeps_the_values(model, ids, cache):
    assert any(t.requires_grad for state in cache.states.values() for t in state.tensors())
    detached = cache.detach()
    assert not any(t.requires_grad for state in detached.states.values() for t in state.tensors())
    assert torch.equal(rest(model, ids, detached), rest(model, ids, cache))


def test_to_moves_every_tensor(cache):
    moved = cache.to("meta")
    tensors = [moved.tokens_seen, *(t for state in moved.states.values() for t in state.tensors())]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.get_seq_length() == 6


def test_reset_starts_over(model, ids, cache):
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes()) == (0, None, 0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **EXACT)


def test_prefix_is_recognised_in_pieces_and_per_row(model, ids):
    cache = HopeCache(model.config)
    for piece in ids[:, :6].split([1, 3, 2], dim=1):
        model(piece, past_key_values=cache)
    assert cache.is_prefix_of(ids)
    assert not cache.is_prefix_of(ids[:, :6])  # nothing new
    assert not cache.is_prefix_of(ids[:2])
    for row, column in ((0, 0), (2, 5), (1, 3)):
        other = ids.clone()
        other[row, column] += 1
        assert not cache.is_prefix_of(other)
    swapped = ids.clone()
    swapped[:, [1, 2]] = swapped[:, [2, 1]]
    assert not cache.is_prefix_of(swapped)
    swapped_rows = cache.select_rows(torch.tensor([1, 0, 2]))
    assert swapped_rows.is_prefix_of(ids[[1, 0, 2]])
    assert not swapped_rows.is_prefix_of(ids)


# File -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_identically(model, ids, tmp_path, dtype):
    model = model.to(dtype)
    cache = model(ids[:, :6]).past_key_values
    cache.save(tmp_path / "state.safetensors")
    loaded = HopeCache.load(tmp_path / "state.safetensors", model)
    assert loaded.tokens_seen.tolist() == [6, 6, 6]
    assert loaded.is_prefix_of(ids)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(model.generate(ids, past_key_values=loaded, **options), expected)
    for name, state in cache.states.items():
        for a, b in zip(state.tensors(), loaded.states[name].tensors(), strict=True):
            assert torch.equal(a, b)


def test_file_carries_version_fingerprint_and_classes(model, cache, tmp_path):
    cache.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "nested_learning.hope_cache"
    assert metadata["version"] == "1"
    assert metadata["fingerprint"] == model.config.fingerprint()
    classes = {name: entry["class"] for name, entry in json.loads(metadata["states"]).items()}
    assert classes == {name: type(state).__name__ for name, state in cache.states.items()}
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_foreign_and_damaged_files_are_refused(tmp_path, ids):
    model = small_model(["attention"])
    path = tmp_path / "state.safetensors"
    model(ids).past_key_values.save(path)
    good, tensors = path.read_bytes(), {name: t.clone() for name, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            HopeCache.load(path, changes.get("model", model))

    refused("another configuration", model=small_model(["attention", "attention"]))
    refused("another configuration", model=small_model(["sliding_window_attention"]).config)
    path.write_bytes(good[: len(good) // 2])
    refused("truncated, corrupt")
    path.write_bytes(b"")
    refused("truncated, corrupt")
    path.write_bytes(b"\x00" * 4096)
    refused("truncated, corrupt")
    save_file(tensors, path)
    refused("not a saved HopeCache")
    save_file(tensors, path, {**metadata, "version": "2"})
    refused("cache format version '2', this package reads '1'")
    save_file(tensors, path, {**metadata, "states": "{"})
    refused("is damaged")
    save_file(tensors, path, {**metadata, "states": metadata["states"].replace("AttentionState", "Nothing")})
    refused("is damaged.*Nothing")
    save_file({k: t for k, t in tensors.items() if "key" not in k}, path, metadata)
    refused("is damaged.*key")
    save_file({**tensors, "layers.0.mixer/extra": torch.zeros(3)}, path, metadata)
    refused("is damaged.*extra")
    save_file({**tensors, "layers.0.mixer/key": tensors["layers.0.mixer/key"][:2].clone()}, path, metadata)
    refused("is damaged.*expected 3 rows")
    with pytest.raises(FileNotFoundError, match="no cache file"):
        HopeCache.load(tmp_path / "nothing", model)


def test_a_failed_write_leaves_the_old_file(tmp_path, ids, monkeypatch):
    model = small_model(["attention"])
    path = tmp_path / "state.safetensors"
    model(ids).past_key_values.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nested_learning.models.hope.cache_hope.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        model(ids[:1]).past_key_values.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.safetensors"]
    with pytest.raises(OSError, match="cannot write"):
        model(ids).past_key_values.save(tmp_path / "missing" / "state.safetensors")
    with pytest.raises(ValueError, match="the cache is empty"):
        HopeCache(model.config).save(path)
