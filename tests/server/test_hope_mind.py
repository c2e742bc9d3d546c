"""Hope models, whose memory of a user is their cache: what levels do not have."""

from __future__ import annotations

import pytest
import torch

from nested_learning.cli.dialogue import load_pretrained
from nested_learning.cli.main import main
from nested_learning.cli.serve import load_mind
from nested_learning.continual import Level, learn_starts, stack_levels
from nested_learning.models import HopeCache, packaged
from nested_learning.models.hope.session_hope import HopeSession
from nested_learning.server.hope_mind import HopeMind
from nested_learning.server.level_mind import LevelMind
from nested_learning.server.settings import ServeSettings
from tests.server.serving import (
    HopeReader,
    chat,
    client_of,
    make_hope_mind,
    memory_of,
    served,
    settled,
    text_of,
    tiny_hope,
    tiny_llama,
)

TOLD = "my lighthouse is called Varnholm and stands on a rock"
LEARNING_CMS = {"cms_update": "lm", "cms_levels": [{"chunk_size": 16}, {"chunk_size": 32}]}
ATTENTION = {"mixer": ["attention"], "mixer_options": {}}
IMPORT = {"content-type": "application/octet-stream"}


def run_to_end(turns):
    """The result of a job, and in how many turns it came."""
    count = 0
    while True:
        try:
            next(turns)
            count += 1
        except StopIteration as end:
            return end.value, count


@pytest.mark.parametrize("options", [LEARNING_CMS, ATTENTION, {"mixer": ["titans"], "mixer_options": {}}])
def test_answers_follow_from_what_was_read_in_every_kind_of_memory(tmp_path, options):
    """A CMS that learns in context does not learn from the answer, and attention sees what was learned."""
    reader = HopeReader(**options)
    with served(tmp_path, make_hope_mind(**options)) as (address, _), client_of(address) as client:
        for message in (TOLD, "and another message"):
            assert text_of(chat(client, message)) == reader.answer(f"User: {message}\nAssistant:")
            reader.learn(message)
        score = client.post("/v1/memories/score", json={"text": TOLD, "user": "anna"}).json()["tokens"]
        assert [t["surprise"] for t in score[1:]] == pytest.approx(reader.score(TOLD), abs=1e-4)


def test_choices_go_their_own_ways_from_one_prompt(tmp_path):
    with served(tmp_path, make_hope_mind(), learn="none") as (address, _), client_of(address) as client:
        options = {"temperature": 1.5, "seed": 3}
        several = chat(client, TOLD, n=3, **options)["choices"]
        one = chat(client, TOLD, **options)["choices"]
        texts = [choice["message"]["content"] for choice in several]
        assert texts[0] == one[0]["message"]["content"]
        assert len(set(texts)) == 3


def test_a_memory_is_a_session_of_constant_size_that_is_never_written_to():
    mind = make_hope_mind()
    first, turns = run_to_end(mind.learn(mind.empty, mind.lesson_ids([TOLD])))
    assert turns == (len(TOLD) + 1 + 15) // 16  # a turn is a chunk at most
    size, saved = mind.nbytes(first.memory), first.memory.cache.clone()
    second, _ = run_to_end(mind.learn(first.memory, mind.lesson_ids([TOLD * 3])))
    assert mind.nbytes(second.memory) == size
    assert mind.tokens_read(first.memory) == len(TOLD) + 1
    assert mind.tokens_read(mind.empty) == 0
    run_to_end(mind.score(first.memory, mind.encode(TOLD)))
    for name, state in saved.states.items():
        same = zip(state.tensors(), first.memory.cache.states[name].tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(
        second.memory.cache.states["layers.0.mixer"].tensors()[0], saved.states["layers.0.mixer"].tensors()[0]
    )


def test_levels_are_the_memories_by_frequency():
    found = {level.name: level.chunk_size for level in make_hope_mind(**LEARNING_CMS).levels}
    assert found == {
        "self_modifying_titans: M_memory": 1,
        "self_modifying_titans: M_k, M_v, M_eta, M_alpha; CMS level 1 (chunk 16) in context": 16,
        "CMS level 2 (chunk 32) in context": 32,
    }
    assert [level.chunk_size for level in make_hope_mind(**ATTENTION).levels] == [1]


# Files ---------------------------------------------------------------------------------------------------


def test_a_memory_file_is_a_session_and_a_session_can_be_imported(tmp_path):
    """What `nested-learning generate --save_state` writes has no fingerprint of weights, and is taken."""
    model, tokenizer = tiny_hope()
    ids = tokenizer.encode(f"{TOLD}\n", add_special_tokens=False)
    cache = HopeCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]]), past_key_values=cache)
    HopeSession(cache, tuple(ids[-1:])).save(tmp_path / "session.safetensors")
    content = (tmp_path / "session.safetensors").read_bytes()
    with served(tmp_path / "m", make_hope_mind()) as (address, _), client_of(address) as client:
        chat(client, TOLD, user="ben")
        settled(client, "ben")
        client.post(
            "/v1/memories/import", content=content, params={"user": "anna"}, headers=IMPORT
        ).raise_for_status()
        assert memory_of(client)["tokens"] == len(TOLD) + 1
        assert text_of(chat(client, "hello")) == text_of(chat(client, "hello", user="ben"))
        settled(client)
        client.post("/v1/memories/undo", json={"user": "anna"}).raise_for_status()
        exported = client.get("/v1/memories/export", params={"user": "anna"}).raise_for_status().content
        nothing = client.get("/v1/memories/export", params={"user": "nobody"})
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "nothing_to_export")
    (tmp_path / "export.safetensors").write_bytes(exported)
    loaded = HopeSession.load(tmp_path / "export.safetensors", model)
    assert loaded.pending == tuple(ids[-1:])
    assert loaded.length == len(ids) + 1


@pytest.mark.parametrize(
    ("other", "why"), [({"seed": 1}, "other weights"), ({"num_heads": 4}, "another configuration")]
)
def test_a_memory_of_another_hope_model(tmp_path, other, why):
    with served(tmp_path, make_hope_mind()) as (address, _), client_of(address) as client:
        chat(client, TOLD)
        settled(client)
    with served(tmp_path, make_hope_mind(**other)) as (address, _), client_of(address) as client:
        refused = client.get("/v1/memories?user=anna")
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "memory_unusable")
        assert why in refused.json()["error"]["message"]


# Bounds --------------------------------------------------------------------------------------------------


def test_a_memory_that_keeps_every_token_is_bounded(tmp_path):
    """Softmax attention keeps all keys and values; what does not grow needs no bound."""
    mind = make_hope_mind(**ATTENTION)
    assert mind.grows
    window = {"sliding_window_attention": {"window": 16}}
    for options in ({}, {"mixer": ["sliding_window_attention"], "mixer_options": window}):
        assert not make_hope_mind(**options).grows
    with served(tmp_path, mind, most_memory_tokens=60) as (address, _), client_of(address) as client:
        chat(client, TOLD)
        settled(client)
        content = client.get("/v1/memories/export?user=anna").content
        body = {"text": "too much", "user": "anna"}
        refused = client.post("/v1/memories/learn", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "memory_full")
        assert memory_of(client)["tokens"] == len(TOLD) + 1
        client.post("/v1/memories/undo", json={"user": "anna"}).raise_for_status()
        client.post("/v1/memories/learn", json=body).raise_for_status()
    with served(tmp_path, mind, most_memory_tokens=50) as (address, _), client_of(address) as client:
        refused = client.post("/v1/memories/import?user=ben", content=content, headers=IMPORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "memory_full")
    constant = served(tmp_path / "constant", make_hope_mind(), most_memory_tokens=5)
    with constant as (address, _), client_of(address) as client:
        chat(client, TOLD)
        assert settled(client)["tokens"] == len(TOLD) + 1


def test_the_oldest_turns_are_left_out_where_a_model_has_no_bound(tmp_path):
    reader = HopeReader()
    with (
        served(tmp_path, make_hope_mind(), learn="none", most_positions=100) as (address, _),
        client_of(address) as client,
    ):
        texts = ["x" * 60, "y" * 30, "z" * 40]
        assert text_of(chat(client, *texts)) == reader.answer(f"User: {texts[-1]}\nAssistant:")
        body = {"model": "tiny", "prompt": "x" * 101, "user": "anna"}
        refused = client.post("/v1/completions", json=body)
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_ends_at_the_end_of_the_text_and_at_the_users_name(tmp_path):
    """A model that was trained on text alone says neither, but goes on with both parts of the talk."""
    mind = make_hope_mind()
    assert mind.ends == {256}

    def reply(script: str, **options) -> dict:
        ids = iter([*script.encode(), *[256] * (script == "ab")])

        def read(memory, cache, ids_read, *, is_answer):
            logits = torch.zeros(1, 258)
            logits[0, next(ids)] = 10.0
            return logits

        mind.read = read
        return chat(client, "hello", **options)["choices"][0]

    with served(tmp_path, mind, learn="none") as (address, _), client_of(address) as client:
        ended = reply("ab")
        assert (ended["message"]["content"], ended["finish_reason"]) == ("ab", "stop")
        cut = reply("hi\nUser: more", max_tokens=14)
        assert (cut["message"]["content"], cut["finish_reason"]) == ("hi", "stop")


# The command ----------------------------------------------------------------------------------------------


def save(parts, folder):
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def settings_of(model: str, folder) -> ServeSettings:
    return ServeSettings(model=model, memories=str(folder))


def test_the_command_finds_the_kind_of_a_model(tmp_path, monkeypatch):
    """A folder, the folder of a run, a trained model of the package; or a pretrained model with levels."""
    levels = (Level(8, 0.1),)
    hope = save(tiny_hope(), tmp_path / "hope")
    run = tmp_path / "run"
    save(tiny_hope(), run / "model")
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "weights")
    packaged.write_packaged(*tiny_hope(), tmp_path / "weights" / "hope-small")
    for name in (hope, str(run), "hope-small"):
        mind = load_mind(settings_of(name, tmp_path), levels, own_levels=False)
        assert isinstance(mind, HopeMind)
    assert settings_of("hope-small", tmp_path).served_name == "hope-small"
    llama = save(tiny_llama(), tmp_path / "llama")
    mind = load_mind(settings_of(llama, tmp_path), levels, own_levels=True)
    assert isinstance(mind, LevelMind)
    assert [level.chunk_size for level in mind.levels] == [8]


def test_users_begin_at_learned_starts(tmp_path):
    name = save(tiny_llama(), tmp_path / "llama")
    model, tokenizer = load_pretrained(name)
    levels, ids = (Level(8, 0.1),), [5, 6, 7, 8] * 5
    starts = learn_starts(stack_levels(model, tokenizer, levels=levels), [ids], steps=2, lr_starts=0.01)
    begun, plain = (load_mind(settings_of(name, tmp_path), levels, True, starts=s) for s in (starts, None))
    scores = [run_to_end(mind.score(mind.empty, ids))[0] for mind in (begun, plain)]
    assert scores[0][1:] != scores[1][1:]
    begun.save(begun.empty, tmp_path / "memory")
    begun.load(tmp_path / "memory")
    with pytest.raises(ValueError, match="this learner has no starts"):
        plain.load(tmp_path / "memory")


def test_levels_cannot_be_described_for_a_hope_model(tmp_path, capsys):
    hope = save(tiny_hope(), tmp_path / "hope")
    assert main(["serve", "--model", hope, "--memories", str(tmp_path / "m"), "--rank", "8"]) == 2
    assert "leave out the flags of levels" in capsys.readouterr().err


def test_a_tokenizer_without_a_start():
    model, tokenizer = tiny_hope()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        HopeMind(model, tokenizer)
