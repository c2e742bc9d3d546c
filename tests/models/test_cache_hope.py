"""HopeCache: branching, rows, devices, and its file."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nested_learning import HopeCache
from nested_learning._tensor_files import checksum
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
    assert moved.to("meta") is moved
    assert cache.to("cpu") is cache
    with torch.device("meta"):
        assert cache.to(None) is cache


def test_accelerate_moves_the_cache_itself(cache):
    with cache.adaptation_scope():
        assert cache.to("meta", non_blocking=False) is cache
        tensors = [cache.tokens_seen, *(t for state in cache.states.values() for t in state.tensors())]
        assert {t.device.type for t in tensors} == {"meta"}
        assert cache.get_seq_length() == 6
    assert cache.tokens_seen.device.type == "cpu"


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


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_under_levels_that_learn_holds_what_was_read(ids, tmp_path, size, padded):
    """Pieces that end between a level's boundaries leave no empty columns, and can be loaded."""
    model = small_model(["attention", "attention"], cms_update="lm")
    cache, path = HopeCache(model.config), tmp_path / "state.safetensors"
    for number, piece in enumerate(ids.split(size, dim=1)):
        mask = torch.ones_like(piece)
        mask[0] = 0 if padded and not number else 1
        model(piece, attention_mask=mask, past_key_values=cache)
        assert cache.states["layers.1.mixer"].positions.shape[1] <= cache.get_seq_length()
        cache.save(path)
        loaded = HopeCache.load(path, model)
        for next_piece in (ids[:, :1], ids[:, :4]):
            expected = model(next_piece, past_key_values=cache.clone()).logits
            assert torch.allclose(model(next_piece, past_key_values=loaded.clone()).logits, expected)
    if not padded:
        assert torch.allclose(expected, model(torch.cat([ids, ids[:, :4]], 1)).logits[:, 13:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_session_goes_on_in_another_precision(model, mixers, ids, tmp_path, dtype):
    exact = model(ids).logits[:, 6:]
    model = model.float()
    model(ids[:, :6]).past_key_values.save(tmp_path / "state.safetensors")
    model = model.to(dtype)
    cache = HopeCache.load(tmp_path / "state.safetensors", model)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids[:, 6:].split([1, 5, 1], dim=1)]
    assert {piece.dtype for piece in pieces} == {dtype}
    error = (torch.cat(pieces, 1).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-3)


def test_file_carries_version_fingerprint_and_classes(model, cache, tmp_path):
    cache.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "nested_learning.hope_cache"
    assert metadata["version"] == "3"
    assert metadata["fingerprint"] == model.config.fingerprint()
    classes = {name: entry["class"] for name, entry in json.loads(metadata["states"]).items()}
    assert classes == {name: type(state).__name__ for name, state in cache.states.items()}
    assert os.listdir(tmp_path) == ["state.safetensors"]


@pytest.fixture
def saved(tmp_path, ids):
    """A cache file of an attention model: its path, tensors and metadata."""
    model = small_model(["attention", "self_modifying_titans"])
    path = tmp_path / "state.safetensors"
    model(ids).past_key_values.save(path)
    with safe_open(path, "pt") as file:
        return model, path, load_file(path), file.metadata()


def refused(path, model, message):
    with pytest.raises(ValueError, match=message):
        HopeCache.load(path, model)


def test_foreign_files_are_refused(saved):
    model, path, tensors, metadata = saved
    refused(path, small_model(["attention", "attention"]), "another configuration")
    refused(path, small_model(["sliding_window_attention"]).config, "another configuration")
    save_file(tensors, path)
    refused(path, model, "not a saved HopeCache")
    save_file(tensors, path, {**metadata, "version": "1"})
    refused(path, model, "cache format version '1', this package reads '2', '3'")
    with pytest.raises(FileNotFoundError, match="no cache file"):
        HopeCache.load(path.with_name("nothing"), model)


def test_broken_files_are_refused(saved):
    model, path, *_ = saved
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"\x00" * 4096):
        path.write_bytes(bad)
        refused(path, model, "truncated, damaged")


KEY = "layers.0.mixer/key"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors[KEY].fill_(torch.nan),
        lambda tensors, _: tensors["layers.1.mixer/position"].add_(1),
        lambda tensors, _: tensors.update({KEY: tensors[KEY][..., :4].contiguous()}),
        lambda tensors, _: tensors.update({KEY: tensors[KEY].float()}),
        lambda _, metadata: metadata.update(columns="12"),
        lambda _, metadata: metadata.pop("sha256"),
    ],
)
def test_changed_content_is_refused(saved, change):
    model, path, tensors, metadata = saved
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    refused(path, model, "is damaged.*(checksum|sha256)")


def without(index: str, name: str, field: str | None = None) -> str:
    """The list of states in a file's metadata without one state, or without one field of it."""
    states = json.loads(index)
    if field is None:
        del states[name]
    else:
        states[name]["fields"].remove(field)
    return json.dumps(states)


@pytest.mark.parametrize(
    ("states", "dropped", "added", "message"),
    [
        (lambda _: "{", "", {}, "is damaged"),
        (lambda _: "[]", "", {}, "is damaged"),
        (lambda _: "7", "", {}, "is damaged"),
        (lambda index: index.replace("AttentionState", "Nothing"), "", {}, "is damaged.*Nothing"),
        (lambda index: index.replace('"fields"', '"fjelds"'), "", {}, "is damaged.*fields"),
        (lambda index: index, "key", {}, "is damaged.*key' is missing"),
        (lambda index: without(index, "layers.1.mixer"), "layers.1", {}, "the model needs.*layers.1"),
        (lambda index: without(index, "layers.0.mixer", "key"), KEY, {}, "lacks key"),
        (
            lambda index: without(index, "layers.1.mixer", "position"),
            "1.mixer/position",
            {},
            "lacks position",
        ),
        (lambda index: index, "tokens_seen", {}, "is damaged.*tokens_seen' is missing"),
        (lambda index: index, "", {"layers.0.mixer/extra": torch.zeros(3)}, "unexpected tensors.*extra"),
        (lambda index: index, KEY, {KEY: torch.zeros(2, 1, 13, 8)}, "is damaged.*expected 3 rows"),
    ],
)
def test_files_with_the_wrong_parts_are_refused(saved, states, dropped, added, message):
    """Even where the checksum is right."""
    model, path, tensors, metadata = saved
    metadata["states"] = states(metadata["states"])
    tensors = {name: t for name, t in tensors.items() if not dropped or dropped not in name} | added
    metadata["sha256"] = checksum(tensors, metadata, json.loads(metadata["checked"]))
    save_file(tensors, path, metadata)
    refused(path, model, message)


def test_metadata_of_others_does_not_matter(saved, ids):
    model, path, tensors, metadata = saved
    save_file(tensors, path, {**metadata, "pending_ids": "[3]"})
    assert HopeCache.load(path, model).get_seq_length() == ids.shape[1]


def test_bytes_shared_between_fields_count_once(ids):
    model = small_model(["self_modifying_titans"])
    sizes = {}
    for length in (8, 9):  # chunks of 4 and 8: after 8 tokens every anchor is the current weight
        cache = model(ids[:, :length]).past_key_values
        (state,) = cache.states.values()
        sizes[length] = cache.nbytes()
    weights = sum(t.numel() * t.element_size() for t in state.current.values())
    assert sizes[9] - sizes[8] == weights
    assert cache.to("meta").nbytes() == sizes[9]


def test_a_failed_write_leaves_the_old_file(tmp_path, ids, monkeypatch):
    model = small_model(["attention"])
    path = tmp_path / "state.safetensors"
    model(ids).past_key_values.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nested_learning._files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        model(ids[:1]).past_key_values.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.safetensors"]
    with pytest.raises(OSError, match="cannot write"):
        model(ids).past_key_values.save(tmp_path / "missing" / "state.safetensors")
    with pytest.raises(ValueError, match="the cache is empty"):
        HopeCache(model.config).save(path)
