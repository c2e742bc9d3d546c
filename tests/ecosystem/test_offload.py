"""Weights that accelerate keeps on disk or elsewhere until a module runs: the same numbers."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from nested_learning import HopeCache, HopeForCausalLM, lens
from nested_learning.training.memories import look
from tests.ecosystem.tiny_hope import hope, ids, slow_but

TEXT = ids()


def run(model):
    """Logits of a whole text, of one with padding and of a continuation, and a few generated tokens."""
    mask = torch.ones_like(TEXT)
    mask[0, :3] = 0
    with torch.no_grad():
        first = model(TEXT[:, :7], use_cache=True)
        second = model(TEXT[:, 7:], past_key_values=first.past_key_values)
        padded = model(TEXT, attention_mask=mask)
    made = model.generate(TEXT, max_new_tokens=3, do_sample=False)
    return first.logits, second.logits, padded.logits, made


@pytest.mark.parametrize("case", slow_but())
def test_cpu_offload(case):
    model = hope(case)
    wanted = run(copy.deepcopy(model))
    offloaded = cpu_offload(model)
    assert all(p.is_meta for p in offloaded.parameters())
    for a, b in zip(run(offloaded), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_session_goes_on_where_the_weights_are_brought(tmp_path):
    model, path = hope("self_modifying_titans"), tmp_path / "session.safetensors"
    with torch.no_grad():
        model(TEXT[:, :7], use_cache=True).past_key_values.save(path)
        wanted = model(TEXT[:, 7:], past_key_values=HopeCache.load(path, model)).logits
        offloaded = cpu_offload(model)
        cache = HopeCache.load(path, offloaded)  # all its weights are on the meta device now
        torch.testing.assert_close(offloaded(TEXT[:, 7:], past_key_values=cache).logits, wanted)


def test_what_looks_at_a_model_sends_ids_to_where_its_weights_are_brought():
    model = hope("self_modifying_titans")
    recorded, looked = lens.record(model, TEXT[0]), look(model, TEXT[0])
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.device == offloaded.model.device == torch.device("cpu")
    again = lens.record(offloaded, TEXT[0])
    assert again.loss[1:] == pytest.approx(recorded.loss[1:], rel=1e-9)
    assert len(again.memories) == len(recorded.memories) == 1
    for layer, wanted in zip(look(offloaded, TEXT[0]), looked, strict=True):
        torch.testing.assert_close(torch.tensor(layer["distance"]), torch.tensor(wanted["distance"]))


@pytest.mark.parametrize("case", slow_but())
def test_a_cache_that_is_passed_in_goes_on_itself(case):
    model = hope(case)
    with torch.no_grad():
        wanted = model(TEXT).logits
        offloaded, cache = cpu_offload(model), HopeCache(model.config)
        pieces = [offloaded(piece, past_key_values=cache).logits for piece in TEXT.split(5, dim=1)]
        assert cache.get_seq_length() == TEXT.shape[1]
        with offloaded.adaptation_scope(cache):
            offloaded(TEXT[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == TEXT.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=1e-12, atol=1e-12)


def test_a_cache_goes_on_itself_whatever_the_default_device():
    """accelerate's hook around an offloaded model names no device to send things to."""
    offloaded = cpu_offload(hope("titans"))
    with torch.no_grad(), torch.device("meta"):
        cache = offloaded(TEXT[:, :5], use_cache=True).past_key_values
        assert offloaded(TEXT[:, 5:], past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == TEXT.shape[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", ["titans", "lm"])
def test_a_head_apart_from_the_model(case, tied, tmp_path):
    model = hope(case, tie_word_embeddings=tied)
    wanted = run(copy.deepcopy(model))
    places = {"model": "cpu", "lm_head": "disk"}
    offloaded = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert offloaded.lm_head._hf_hook.offload
    for a, b in zip(run(offloaded), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_embedding_as_head_is_brought_too():
    """A model without a head of its own that learns from the next token."""
    model = hope("lm").model
    with torch.no_grad():
        wanted = model(TEXT).last_hidden_state
        got = cpu_offload(model)(TEXT).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", slow_but(["loaded"], ["loaded", "disk", "dispatch", "parts"]))
@pytest.mark.parametrize("case", ["self_modifying_titans", "mag", "regression nested", "lm learned rates"])
def test_disk(case, how, tmp_path):
    model = hope(case)
    wanted = run(copy.deepcopy(model))
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    if how == "disk":
        offloaded = disk_offload(model, tmp_path)
    elif how == "dispatch":
        offloaded = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    else:
        if how == "parts":
            places = {"model.layers.0.cms": "disk", "model.norm": "disk"}
            places |= {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0.mixer")}
            places |= {"model.layers.0.mixer_norm": "cpu", "lm_head": "cpu"}
        model.save_pretrained(tmp_path / "model")
        offloaded = HopeForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest", dtype=torch.float64
        )
    assert any(p.is_meta for p in offloaded.parameters())
    for a, b in zip(run(offloaded.eval()), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
