"""What users tell is learned once, kept, shown, taken back, deleted."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.server.folder import folder_name
from nested_learning.server.journal import Entry, Journal
from nested_learning.server.keys import add_key
from tests.server.serving import (
    MINDS,
    READERS,
    LevelReader,
    chat,
    client_of,
    make_mind,
    memory_of,
    served,
    settled,
    text_of,
    tiny_llama,
    until,
)

TOLD = "my lighthouse is called Varnholm and stands on a rock"


@pytest.fixture(scope="module", params=list(MINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def mind(kind):
    return MINDS[kind]()


@pytest.fixture
def reader(kind):
    return READERS[kind]()


@pytest.fixture(scope="module")
def running(mind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories")
    with served(folder, mind, undo=3) as (address, _), client_of(address) as client:
        yield client, folder


@pytest.fixture
def client(running):
    return running[0]


def user_folder(running, user: str):
    return running[1] / folder_name(user)


def test_an_average_answers_in_its_levels_place(tmp_path):
    """As in `Learner.score` and `generate`: the raw level is in force while it learns alone."""
    levels = (Level(8, 0.5), Level(16, average_of=0, rate=0.2))
    model, tokenizer = tiny_llama()
    learner = stack_levels(model, tokenizer, levels=levels)
    learner.observe(f"{TOLD}\n")
    asked = "a lighthouse on a rock"
    with served(tmp_path, make_mind(levels)) as (address, _), client_of(address) as client:
        told = client.post("/v1/memories/learn", json={"text": TOLD, "user": "anna"})
        assert told.status_code == 200
        scored = client.post("/v1/memories/score", json={"text": asked, "user": "anna"}).json()["tokens"]
    averaged, raw = learner.score(asked), learner.score(asked, levels=[0])
    assert not torch.allclose(averaged[1:], raw[1:])
    found = torch.tensor([each["surprise"] for each in scored[1:]])
    torch.testing.assert_close(found, averaged[1:], rtol=1e-4, atol=1e-4)


def test_what_was_told_is_learned_once_and_answers_follow_from_it(client, mind, reader):
    """Three requests of one conversation, against a reader that learns each message once, in order."""
    texts: list[str] = []
    for message in (TOLD, "second message, long enough for a chunk", "third"):
        texts.append(message)
        answer = text_of(chat(client, *texts, user="once"))
        names = ["User: ", "Assistant: "]
        prompt = "".join(f"{names[i % 2]}{text}\n" for i, text in enumerate(texts)) + "Assistant:"
        assert answer == reader.answer(prompt)
        reader.learn(message)
        texts.append(answer)
    shown = settled(client, "once")
    assert shown["tokens"] == reader.tokens
    assert shown["conversations_to_undo"] == 1
    assert [level["writes"] for level in shown["levels"]] == [
        shown["tokens"] // level.chunk_size for level in mind.levels
    ]
    chat(client, *texts[:-1], user="once")  # once more, for another answer
    assert settled(client, "once")["tokens"] == shown["tokens"]


@pytest.mark.parametrize("learn", ["user", "both"])
def test_requests_of_one_conversation_at_once_teach_it_once(mind, tmp_path, learn):
    with served(tmp_path, mind, learn=learn) as (address, _), client_of(address) as client:
        answers: list[dict] = []

        def send() -> None:
            answers.append(chat(client, TOLD))

        senders = [threading.Thread(target=send) for _ in range(3)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        texts = {TOLD, *map(text_of, answers)} if learn == "both" else {TOLD}
        shown = settled(client)
        assert shown["tokens"] == sum(len(text) + 1 for text in texts)
        assert shown["conversations_to_undo"] == 1
        chat(client, TOLD, text_of(answers[0]), "more")
        assert settled(client)["conversations_to_undo"] == 1


def test_the_memory_file_is_that_of_a_learner(tmp_path):
    with served(tmp_path, make_mind()) as (address, _), client_of(address) as client:
        chat(client, TOLD, user="file")
        settled(client, "file")
    learner = LevelReader().learner
    learner.observe(f"{TOLD}\n")
    expected = learner.memory.diff()
    folder = tmp_path / folder_name("file")
    (path,) = folder.glob("*.safetensors")
    shutil.copy(path, tmp_path / "copy.safetensors")
    learner.memory.reset()
    learner.memory.load(tmp_path / "copy.safetensors")
    assert learner.memory.diff().keys() == expected.keys() != set()
    assert all(torch.equal(delta, learner.memory.diff()[name]) for name, delta in expected.items())
    assert not (folder / "journal").exists()  # with the text in it


@pytest.mark.parametrize("mode", ["user", "assistant", "both", "none"])
def test_turns_that_are_learned(mind, tmp_path, mode):
    with served(tmp_path, mind, learn=mode) as (address, _), client_of(address) as client:
        body = {"role": "system", "content": "a system message is never learned"}
        given = {"messages": [body, {"role": "user", "content": "hello"}]}
        answer = text_of(chat(client, **given))
        lengths = {"user": 6, "assistant": len(answer) + 1, "both": 7 + len(answer), "none": 0}
        assert settled(client)["tokens"] == lengths[mode]
        chat(client, "hello", answer, "more")
        lengths = {"user": 11, "assistant": 2 * len(answer) + 2, "both": 13 + 2 * len(answer), "none": 0}
        assert settled(client)["tokens"] == lengths[mode]


def test_score_and_learn(client, kind, mind, reader):
    expected = reader.score(TOLD)
    score = client.post("/v1/memories/score", json={"text": TOLD, "user": "s"}).json()
    assert [t["surprise"] for t in score["tokens"][1:]] == pytest.approx(expected, abs=1e-5)
    assert "".join(t["token"] for t in score["tokens"]) == TOLD
    # a text that levels learn has nothing before it; that of a Hope model begins with a token of its own
    assert (score["tokens"][0]["surprise"] is None) == (kind == "levels")
    known = [t["surprise"] for t in score["tokens"] if t["surprise"] is not None]
    assert score["mean_surprise"] == pytest.approx(sum(known) / len(known), abs=1e-5)
    lesson = client.post("/v1/memories/learn", json={"text": TOLD, "user": "s"}).json()
    losses = reader.learn(TOLD)
    assert [t["surprise"] for t in lesson["tokens"][1:]] == pytest.approx(losses, abs=1e-5)
    assert lesson["written"] == [(len(TOLD) + 1) // level.chunk_size for level in mind.levels]
    if kind == "levels":
        passed = [(write.level, write.position, write.outcome) for write in reader.learner.writes]
        assert [(w["level"], w["position"], w["outcome"]) for w in lesson["writes"]] == passed
        assert len(passed) == 9
    after = client.post("/v1/memories/score", json={"text": TOLD, "user": "s"}).json()
    if kind == "levels":  # a model with random weights has not learned how to learn
        assert after["mean_surprise"] < score["mean_surprise"]
    assert after["mean_surprise"] != score["mean_surprise"]
    assert memory_of(client, "s")["last_lesson"]["mean_surprise"] == lesson["mean_surprise"]


def test_undo_takes_back_whole_conversations_bit_for_bit(client):
    def score() -> float:
        body = {"text": TOLD, "user": "u"}
        return client.post("/v1/memories/score", json=body).raise_for_status().json()["mean_surprise"]

    def undo(count: int):
        return client.post("/v1/memories/undo", json={"conversations": count, "user": "u"})

    scores = [score()]
    for name in "abcd":
        first = f"conversation {name}, long enough for chunks"
        answer = text_of(chat(client, first, user="u"))
        chat(client, first, answer, f"and more of conversation {name}", user="u")
        scores.append(score())
    assert len(set(scores)) == 5
    assert settled(client, "u")["conversations_to_undo"] == 3
    assert undo(1).status_code == 200
    assert score() == scores[3]
    chat(client, first, answer, "and more of conversation d", user="u")  # what was taken back stays so
    assert score() == scores[3]
    assert undo(3).status_code == 409
    assert undo(2).json()["conversations_to_undo"] == 0
    assert score() == scores[1]
    refused = undo(1)
    assert refused.status_code == 409
    assert refused.json()["error"]["param"] == "conversations"


@pytest.mark.parametrize("how", ["reset", "delete"])
def test_forgetting_takes_everything(client, running, how):
    chat(client, TOLD, user=how)
    chat(client, "another conversation, also learned", user=how)
    settled(client, how)
    assert user_folder(running, how).exists()
    if how == "reset":
        assert client.post("/v1/memories/reset", json={"user": how}).json()["reset"] is True
    else:
        assert client.delete("/v1/memories", params={"user": how}).json()["deleted"] is True
    assert not user_folder(running, how).exists()
    shown = memory_of(client, how)
    assert (shown["tokens"], shown["bytes"], shown["conversations_to_undo"]) == (0, 0, 0)
    chat(client, TOLD, user=how)
    assert settled(client, how)["tokens"] == len(TOLD) + 1


def test_export_and_import(client, tmp_path):
    chat(client, TOLD, user="from")
    content = client.get("/v1/memories/export", params={"user": "from"}).raise_for_status().content
    header = {"content-type": "application/octet-stream"}

    def take_over(data: bytes, user: str):
        return client.post("/v1/memories/import", content=data, params={"user": user}, headers=header)

    chat(client, "told before", user="to")
    assert take_over(content, "to").json()["tokens"] == len(TOLD) + 1
    assert text_of(chat(client, "hello", user="to")) == text_of(chat(client, "hello", user="from"))
    settled(client, "to")
    undone = client.post("/v1/memories/undo", json={"conversations": 2, "user": "to"}).json()
    assert undone["tokens"] == len("told before") + 1
    for wrong in (content[:-100], content[:200] + b"x" + content[201:], b"", b"{}"):
        refused = take_over(wrong, "to")
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "not_a_memory"
    assert memory_of(client, "to")["tokens"] == len("told before") + 1


def test_memories_persist_and_journals_are_replayed(mind, reader, tmp_path):
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        chat(client, TOLD)
        settled(client)
    folder = tmp_path / folder_name("anna")
    Journal(folder / "journal").append(Entry(2, "c", ("told last, and not learned yet",)))
    for text in (TOLD, "told last, and not learned yet"):
        reader.learn(text)
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        deadline = time.time() + 10
        while (folder / "journal").exists() and time.time() < deadline:
            time.sleep(0.02)  # replayed without any request
        assert memory_of(client)["tokens"] == reader.tokens
        score = client.post("/v1/memories/score", json={"text": TOLD, "user": "anna"}).json()
        found = [t["surprise"] for t in score["tokens"][1:]]
        assert found == pytest.approx(reader.score(TOLD), abs=1e-5)


def test_keys_say_who_asks(mind, tmp_path):
    keys = tmp_path / "keys"
    anna, ben = add_key(keys, "anna"), add_key(keys, "ben")
    with served(tmp_path / "m", mind, keys=str(keys)) as (address, _), client_of(address) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": TOLD}], "user": "ben"}
        for headers in ({}, {"authorization": "Bearer nl-wrong"}, {"authorization": f"Basic {anna}"}):
            for path in ("/v1/models", "/v1/memories", "/v1/memories/export", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
            refused = client.post("/v1/chat/completions", json=body, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert client.delete("/v1/memories", headers=headers).status_code == 401
        as_anna, as_ben = ({"authorization": f"Bearer {key}"} for key in (anna, ben))
        client.post("/v1/chat/completions", json=body, headers=as_anna).raise_for_status()
        # the user that a request names counts for nothing where there are keys
        assert _tokens(client, as_anna) == len(TOLD) + 1
        assert _tokens(client, as_ben) == 0
        assert client.get("/v1/memories?user=anna", headers=as_ben).json()["tokens"] == 0


def _tokens(client, headers) -> int:
    deadline = time.time() + 10
    while time.time() < deadline:
        shown = client.get("/v1/memories", headers=headers).json()
        if not shown["pending_tokens"]:
            return shown["tokens"]
        time.sleep(0.02)
    raise AssertionError("it was not learned")


def test_no_key_and_not_this_computer(mind, tmp_path):
    with (
        served(tmp_path, mind, host="0.0.0.0") as (address, _),
        client_of(address.replace("0.0.0.0", "127.0.0.1")) as client,
    ):
        refused = client.get("/v1/models")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "no_keys"
        assert client.get("/health").status_code == 200


def test_low_rank_levels(tmp_path):
    levels = (Level(8, 0.5, rank=2), Level(16, 0.2, rank=2))
    model, tokenizer = tiny_llama()
    learner = stack_levels(model, tokenizer, levels=levels)
    expected = learner.generate(
        "User: hello\nAssistant:", max_new_tokens=12, do_sample=False, pad_token_id=257
    )
    mind = make_mind(levels)
    assert mind.nbytes(mind.empty) == 0  # answering makes no factors, which other threads could read by then
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        assert text_of(chat(client, "hello", user="ben")) == expected
        chat(client, TOLD)
        learner.observe(f"{TOLD}\n")
        expected = learner.generate(
            "User: what?\nAssistant:", max_new_tokens=12, do_sample=False, pad_token_id=257
        )
        assert text_of(chat(client, "what?")) == expected
    assert mind.nbytes(mind.empty) == 0
    learner.observe("what?\n")
    with served(tmp_path, make_mind(levels)) as (address, _), client_of(address) as client:
        score = client.post("/v1/memories/score", json={"text": TOLD, "user": "anna"}).json()
        assert score["mean_surprise"] == pytest.approx(float(learner.score(TOLD)[1:].mean()), abs=1e-5)


def test_memories_beyond_the_budget_are_put_away_and_come_back(mind, tmp_path):
    with served(tmp_path, mind, most_users=2) as (address, service), client_of(address) as client:
        answers = {}
        for name in "abcde":
            chat(client, f"{TOLD} says {name}", user=name)
            settled(client, name)
            answers[name] = text_of(chat(client, "hello", user=name, model="tiny"))
            settled(client, name)
            assert len(service.memories.users) <= 2
        for name in "abcde":
            shown = memory_of(client, name)
            assert shown["tokens"] == len(f"{TOLD} says {name}\nhello\n")
            assert len(service.memories.users) <= 2


def test_users_who_were_only_asked_for_leave_nothing(mind, tmp_path):
    """Any name may be asked for: names that are made up must not fill the disk with folders."""
    with served(tmp_path, mind, most_users=2) as (address, _), client_of(address) as client:
        for name in "abcde":
            assert memory_of(client, name)["tokens"] == 0
        chat(client, TOLD, user="anna")
        settled(client, "anna")
        assert len(list(tmp_path.iterdir())) <= 2  # loaded ones keep others from opening theirs
    (left,) = tmp_path.iterdir()
    assert left.name == folder_name("anna")
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        assert memory_of(client, "anna")["tokens"] == len(TOLD) + 1
        assert memory_of(client, "a")["tokens"] == 0


def test_bounds_of_requests(mind, tmp_path):
    """One request more than a user may have gets a 429, one more than there may be a 503."""
    bounds = {
        "most_requests_per_user": 1,
        "most_requests": 2,
        "most_pending_tokens": 40,
        "most_lesson_tokens": 30,
    }
    with served(tmp_path, mind, **bounds) as (address, service), client_of(address) as client:
        blocker = threading.Event()

        def block():
            while not blocker.is_set():
                time.sleep(0.001)
                yield

        job = service.scheduler.submit("x", block())
        threads = [
            threading.Thread(target=lambda user=user: chat(client, "hello", user=user, max_tokens=200))
            for user in ("a", "b")
        ]
        for thread in threads:
            thread.start()
        until(lambda: service._running.total() == 2)
        refused = client.get("/v1/memories", params={"user": "a"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/v1/memories", params={"user": "c"}).status_code == 503
        blocker.set()
        job.result.result(10)
        for thread in threads:
            thread.join(20)
        assert client.get("/v1/memories", params={"user": "c"}).status_code == 200
        long = client.post("/v1/memories/learn", json={"text": "x" * 31, "user": "c"})
        assert (long.status_code, long.json()["error"]["code"]) == (413, "text_too_long")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 50}], "user": "c"}
        assert client.post("/v1/chat/completions", json=body).status_code == 413
