"""Damaged session files: a ValueError with a sentence, and nothing changed; or it works and round-trips."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nested_learning import HopeCache, HopeConfig, HopeForCausalLM
from nested_learning.cli.conversation import Conversation
from nested_learning.models.hope import expected_states as module
from nested_learning.models.presets import preset
from nested_learning.training.data import byte_tokenizer
from tests.compat import cases
from tests.damage import check_refusal, damaged_bytes, damaged_content, read_file, write_checked
from tests.models.small_models import VOCAB, small_model

SLOW = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
FAST = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
MIXERS = ["sliding_window_attention", "self_modifying_titans", "attention", "titans"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with several kinds of states, and the file and content of a session amid all chunks."""
    model = small_model(
        MIXERS,
        cms_update="lm",
        mixer_options={
            "attention": {"num_kv_heads": 1},
            "sliding_window_attention": {"window": 4},
            "self_modifying_titans": {"chunk_size": 4, "projection_chunk_size": 8},
            "titans": {"chunk_size": 4},
        },
        cms_levels=[{"chunk_size": 4}, {"chunk_size": 8, "rule": "adam"}],
    )
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("session") / "session"
    with torch.no_grad():
        model(ids, use_cache=True).past_key_values.save(path, {"pending_ids": "[3]"})
    return model, path, *read_file(path)


@torch.no_grad()
def load_or_refuse(model, path):
    written = path.read_bytes()
    try:
        cache = HopeCache.load(path, model)
    except ValueError as error:
        check_refusal(error, path)
        assert path.read_bytes() == written
        return None
    again = path.with_name("again")
    cache.save(again)
    other = HopeCache.load(again, model)
    assert str(other.tokens_seen) == str(cache.tokens_seen)
    for name, state in cache.states.items():
        assert str(other.states[name].to_tensors()) == str(state.to_tensors())
    model(torch.zeros(cache.batch_size, 5, dtype=torch.long), past_key_values=cache.clone())
    return cache


def assert_equal_states(first, second):
    assert first.states.keys() == second.states.keys()
    for name, state in first.states.items():
        tensors, others = state.to_tensors(), second.states[name].to_tensors()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(t, others[field]) for field, t in tensors.items())


def fuzz_bytes(saved, data):
    model, path, *_ = saved
    damaged = path.with_name("damaged")
    damaged.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    cache = load_or_refuse(model, damaged)
    if cache is not None:  # bits that say nothing, such as those of a bool beyond the first
        assert_equal_states(cache, HopeCache.load(path, model))


def fuzz_content(saved, data):
    model, path, tensors, metadata = saved
    damaged = path.with_name("damaged")
    metadata = dict(metadata)
    if data.draw(st.booleans(), label="of the version before"):
        metadata = {k: v for k, v in metadata.items() if k != "checked"} | {"version": "2"}
    write_checked(
        damaged, *data.draw(damaged_content(tensors, metadata)), legacy=("fingerprint", "columns", "states")
    )
    load_or_refuse(model, damaged)


@FAST
@given(data=st.data())
def test_damaged_bytes(saved, data):
    fuzz_bytes(saved, data)


@FAST
@given(data=st.data())
def test_damaged_content_with_the_right_checksum(saved, data):
    fuzz_content(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage_to_bytes(saved, data):
    fuzz_bytes(saved, data)


@pytest.mark.slow
@SLOW
@given(data=st.data())
def test_much_damage_to_content(saved, data):
    fuzz_content(saved, data)


def put(name, change):
    return lambda t, m: t.update({name: change(t[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("layers.1.mixer/position", lambda t: t - 5 - t), "position has the value -5, expected 0 to 7"),
        (put("layers.1.mixer/position", lambda t: t * 0 + 10**12), "has the value 1000000000000"),
        (put("layers.3.mixer/position", lambda t: t * 0 + 4), "has the value 4, expected 0 to 3"),
        (put("layers.1.cms/position", lambda t: t * 0 + 8), "has the value 8, expected 0 to 7"),
        (put("layers.1.mixer/position", lambda t: t.int()), "position is torch.int32, expected torch.int64"),
        (put("layers.1.mixer/current.W1", lambda t: t.long()), "W1 is torch.int64, expected floating-point"),
        (put("layers.1.mixer/current.W1", lambda t: t.to(torch.complex64)), "W1 is torch.complex64"),
        (put("layers.1.mixer/anchor.W2", lambda t: t[..., 1:]), r"anchor.W2 has shape \[2, 5, 2, 8, 7\]"),
        (put("layers.1.mixer/anchor.W2", lambda t: t[:, 0]), "anchor.W2 has shape"),
        (put("layers.2.mixer/positions", lambda t: t * 0 + 11), "has the value 11, expected -1 to 10"),
        (put("layers.2.mixer/positions", lambda t: t - 2), "has the value -2"),
        (put("layers.2.mixer/key", lambda t: t[:, :, 1:]), r"holds \[10, 11\] tokens"),
        (put("pending/ids", lambda t: t + VOCAB), "expected 0 to 30"),
        (put("pending/count", lambda t: t * 0 + 5), "has the value 5, expected 0 to 4"),
        (put("pending/learned", lambda t: t.long()), "learned is torch.int64"),
        (put("tokens_seen", lambda t: t * 0 + 12), "expected 0 to 11, the columns"),
        (put("tokens_seen", lambda t: t - 20), "expected 0 to 11, the columns"),
        (put("tokens_seen", lambda t: t.double()), "tokens_seen is torch.float64"),
        (put("prefix_hash", lambda t: t[:1]), "prefix_hash has shape"),
        (lambda t, m: m.update(columns="-5"), "columns is '-5'"),
        (lambda t, m: m.update(columns="1_1"), "columns is '1_1'"),
        (lambda t, m: m.update(columns="9" * 30), "columns is '999"),
        (lambda t, m: m.update(states="[" * 100_000), "nested too deep"),
        (
            lambda t, m: m.update(states=m["states"].replace("PendingChunk", "CMSState")),
            "pending is a CMSState",
        ),
        (lambda t, m: m.pop("states"), "states.* is missing"),
        (lambda t, m: m.update(version="9"), "version '9', this package reads '2', '3'"),
    ],
)
def test_each_field(saved, change, message):
    """Even where the checksum is right."""
    model, path, tensors, metadata = saved
    tensors, metadata = dict(tensors), dict(metadata)
    change(tensors, metadata)
    damaged = path.with_name("changed")
    write_checked(damaged, tensors, metadata)
    with pytest.raises(ValueError, match=message) as error:
        HopeCache.load(damaged, model)
    check_refusal(error.value, damaged)


def test_notes_are_covered_by_the_checksum(saved):
    from safetensors.torch import save_file

    model, path, tensors, metadata = saved
    damaged = path.with_name("changed")
    save_file(tensors, damaged, {**metadata, "pending_ids": "[4]"})
    with pytest.raises(ValueError, match=r"damaged.*checksum"):
        HopeCache.load(damaged, model)


@functools.cache
def saved_model(name):
    return AutoModelForCausalLM.from_pretrained(cases.FILES / f"model-{name}").eval()


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["regression", "nested", "lm"]),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.integers(1, 2),
    padding=st.integers(0, 3),
)
@torch.no_grad()
def test_whatever_was_saved_loads(tmp_path_factory, name, pieces, rows, padding):
    """At any place within the chunks, padded or not: no honest file is refused."""
    model = saved_model(name)
    path = tmp_path_factory.mktemp("honest") / "session"
    cache = HopeCache(model.config)
    mask = torch.ones(rows, sum(pieces), dtype=torch.long)
    mask[-1, : min(padding, pieces[0] - 1)] = 0
    done = 0
    for piece in pieces:
        done += piece
        ids = torch.full((rows, piece), done % 32)
        model(ids, attention_mask=mask[:, :done], past_key_values=cache)
        cache.save(path)
        loaded = HopeCache.load(path, model)
        assert_equal_states(loaded, cache)


def test_the_states_of_a_model_are_found_once_and_without_its_weights(saved, monkeypatch):
    model, path, *_ = saved
    HopeCache.load(path, model)
    monkeypatch.setattr(module, "_find", None)
    HopeCache.load(path, HopeConfig(**model.config.to_diff_dict()))


def test_a_mixer_that_looks_at_its_numbers_is_run_on_the_cpu(saved, monkeypatch):
    """As one of others' may: the meta device has none."""
    model, path, *_ = saved
    monkeypatch.setattr(module, "_known", {})
    devices = []
    find = module._find_on

    def find_on(device, config):
        devices.append(device)
        if device == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return find(device, config)

    monkeypatch.setattr(module, "_find_on", find_on)
    HopeCache.load(path, model)
    assert devices == ["meta", "cpu"]


class TestConversation:
    @pytest.fixture
    def talk(self, tmp_path):
        """A conversation of one text that was saved, and its path."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
        model, tokenizer = HopeForCausalLM(preset("hope-tiny", **sizes)).eval(), byte_tokenizer()
        conversation = Conversation.open(model, tokenizer, None)
        conversation.generate("abc", max_new_tokens=3, do_sample=False)
        path = tmp_path / "talk"
        conversation.save(path)
        return conversation, path

    def test_goes_on(self, talk):
        conversation, path = talk
        loaded = Conversation.open(conversation.model, conversation.tokenizer, str(path))
        assert loaded.pending == conversation.pending
        assert loaded.tokens_seen == conversation.tokens_seen
        options = {"max_new_tokens": 4, "do_sample": False}
        assert loaded.generate("d", **options) == conversation.generate("d", **options)

    @pytest.mark.parametrize(
        "pending",
        ["7", "null", '"ab"', '["a"]', "[1.5]", "[true]", "[-5]", "[1000000000000]", "[[3]]", "{}", "["],
    )
    @pytest.mark.parametrize("checked", [True, False])
    def test_pending_that_is_no_list_of_ids(self, talk, pending, checked):
        conversation, path = talk
        tensors, metadata = read_file(path)
        metadata["pending_ids"] = pending
        if not checked:
            metadata["checked"] = json.dumps(
                [n for n in json.loads(metadata["checked"]) if n != "pending_ids"]
            )
        write_checked(path, tensors, metadata)
        with pytest.raises(ValueError, match="damaged: its pending_ids is") as error:
            Conversation.open(conversation.model, conversation.tokenizer, str(path))
        check_refusal(error.value, path)

    def test_of_several_texts(self, talk):
        conversation, path = talk
        cache = conversation.cache.select_rows(torch.tensor([0, 0]))
        cache.save(path)
        with pytest.raises(ValueError, match="2 texts side by side"):
            Conversation.open(conversation.model, conversation.tokenizer, str(path))
