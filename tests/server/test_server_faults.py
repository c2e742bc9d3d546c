"""Faults: full disks, damaged and locked files, clients that go, machines without memory, the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from nested_learning.continual.files import locked
from nested_learning.server.folder import folder_name
from nested_learning.server.journal import Journal
from tests.server.serving import (
    LEVELS,
    MINDS,
    chat,
    client_of,
    conversation,
    make_mind,
    memory_of,
    served,
    settled,
    started_process,
    text_of,
    tiny_hope,
    tiny_llama,
    until,
)

TOLD = "my lighthouse is called Varnholm"


@pytest.fixture(scope="module", params=list(MINDS))
def mind(request):
    return MINDS[request.param]()


@pytest.fixture
def running(mind, tmp_path):
    with served(tmp_path, mind, max_tokens=8) as (address, service), client_of(address) as client:
        yield client, service, tmp_path


def post(client, text: str, **options):
    body = {"model": "tiny", "messages": conversation(text), "user": "anna", **options}
    return client.post("/v1/chat/completions", json=body)


def full_disk(*args, **options):
    raise OSError(28, "No space left on device", "journal")


def test_an_answer_that_cannot_be_kept_is_not_acknowledged(running, monkeypatch):
    client, _, _ = running
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full_disk)
        refused = post(client, TOLD)
        assert refused.status_code == 507
        assert "No space left" in refused.json()["error"]["message"]
        events = post(client, TOLD, stream=True).text.split("\n\n")
        assert "[DONE]" not in events[-2]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "storage"
        assert not any('"finish_reason":"length"' in event for event in events)
    assert memory_of(client)["tokens"] == 0
    chat(client, TOLD)
    assert settled(client)["tokens"] == len(TOLD) + 1


def test_a_full_disk_keeps_the_journal_until_there_is_room(running, mind, monkeypatch):
    client, _, folder = running
    save = mind.save
    monkeypatch.setattr("nested_learning.server.user.RETRY_SECONDS", 0.05)
    monkeypatch.setattr(mind, "save", full_disk)
    for number in range(4):
        chat(client, f"{TOLD} {number}")
    shown = settled(client)
    assert shown["tokens"] == 4 * (len(TOLD) + 3)
    assert "cannot be saved yet" in memory_of(client)["trouble"]
    assert client.get("/health").json()["troubles"] == 1
    assert shown["conversations_to_undo"] == 2  # those before are given up, or the memories would pile up
    journal = folder / folder_name("anna") / "journal"
    assert len(Journal(journal).after(0)[0]) == 4
    monkeypatch.setattr(mind, "save", save)
    until(lambda: not journal.exists())
    assert client.post("/v1/memories/undo", json={"user": "anna"}).json()["tokens"] == 3 * (len(TOLD) + 3)


def test_a_user_is_kept_while_the_memory_is_being_written(running, mind, monkeypatch):
    """What is on its way to the disk must not be put away: another process could open the folder."""
    client, service, _ = running
    save, go_on, begun = mind.save, threading.Event(), threading.Event()

    def slow(memory, path):
        begun.set()
        assert go_on.wait(20)
        save(memory, path)

    monkeypatch.setattr(mind, "save", slow)
    chat(client, TOLD)
    settled(client)
    assert begun.wait(20)
    (user,) = service.memories.users
    try:
        assert not user.pending
        assert not user.is_idle
    finally:
        go_on.set()
    until(lambda: user.is_idle)


def test_an_import_that_the_disk_has_no_room_for_is_told(running, monkeypatch):
    client, _, _ = running
    chat(client, TOLD)
    settled(client)
    exported = client.get("/v1/memories/export?user=anna").content
    monkeypatch.setattr("nested_learning.server.memory_routes.read_body", full_disk)
    body = {"content": exported, "headers": {"content-type": "application/octet-stream"}}
    refused = client.post("/v1/memories/import?user=anna", **body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
    assert "None" not in refused.json()["error"]["message"]
    assert memory_of(client)["tokens"] == len(TOLD) + 1


def test_what_cannot_be_undone_or_deleted_stays(running, monkeypatch):
    client, _, folder = running
    chat(client, TOLD)
    settled(client)
    until(lambda: not (folder / folder_name("anna") / "journal").exists())
    with monkeypatch.context() as patch:
        patch.setattr("nested_learning.server.folder.UserFolder.commit", full_disk)
        undone = client.post("/v1/memories/undo", json={"user": "anna"})
        assert (undone.status_code, undone.json()["error"]["code"]) == (507, "storage")
        assert memory_of(client)["tokens"] == len(TOLD) + 1
        patch.setattr("nested_learning.server.folder.UserFolder.delete", full_disk)
        assert client.delete("/v1/memories?user=anna").status_code == 507
    chat(client, "and more")
    assert settled(client)["tokens"] == len(TOLD) + len("and more") + 2


@pytest.mark.parametrize("what", ["memory", "manifest", "missing"])
def test_damaged_files_are_told_and_can_be_deleted(mind, tmp_path, what):
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        chat(client, TOLD)
        settled(client)
    folder = tmp_path / folder_name("anna")
    path = folder / "manifest.json" if what == "manifest" else next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :])
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        refused = post(client, "hello")
        assert refused.status_code == 500
        assert refused.json()["error"]["code"] == "memory_unusable"
        assert str(tmp_path) not in refused.text
        assert post(client, "hello", user="ben").status_code == 200
        path.write_bytes(content)  # the copy is put back while the server runs
        assert memory_of(client)["tokens"] == len(TOLD) + 1
        path.write_bytes(b"")
    with served(tmp_path, mind) as (address, _), client_of(address) as client:
        assert client.delete("/v1/memories?user=anna").status_code == 200
        assert memory_of(client)["tokens"] == 0


def test_an_export_keeps_its_file_until_it_is_sent(running, monkeypatch):
    from starlette.responses import FileResponse

    client, service, folder = running

    async def others_come(self, scope, receive, send, sent=FileResponse.__call__):
        service.memories.make_room(places=10**6)  # all who are idle are put away
        async with service.memories.using("anna"):  # who comes again finds no file of theirs left over
            await sent(self, scope, receive, send)

    chat(client, TOLD)
    settled(client)
    monkeypatch.setattr(FileResponse, "__call__", others_come)
    exported = client.get("/v1/memories/export", params={"user": "anna"})
    assert exported.status_code == 200
    assert len(exported.content) == int(exported.headers["content-length"])
    until(lambda: not service._running)
    assert not list(folder.rglob("transfer-*"))
    assert all(user.pins == 0 for user in service.memories.users)


def test_a_memory_that_another_process_has(running):
    client, _, folder = running
    name = folder / folder_name("anna")
    name.mkdir()
    with locked(name / "memory"):
        refused = post(client, "hello")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "memory_in_use"
        assert refused.headers["retry-after"] == "5"
        also = client.delete("/v1/memories?user=anna")
        assert also.status_code == 503
        assert str(folder) not in refused.text + also.text
    assert post(client, "hello").status_code == 200


def test_a_memory_of_another_model(tmp_path):
    with served(tmp_path, make_mind()) as (address, _), client_of(address) as client:
        chat(client, TOLD)
        settled(client)
    with served(tmp_path, make_mind(LEVELS[:1])) as (address, _), client_of(address) as client:
        refused = post(client, "hello")
        assert refused.status_code == 500
        assert "other levels" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer_and_teaches_nothing(running, mind, monkeypatch, stream):
    client, service, folder = running
    written = []
    read = mind.read

    def slow(*args, **options):
        written.append(1)
        time.sleep(0.02)
        return read(*args, **options)

    monkeypatch.setattr(mind, "read", slow)
    body = {
        "model": "tiny",
        "messages": conversation(TOLD),
        "user": "anna",
        "max_tokens": 200,
        "stream": stream,
    }
    if stream:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    else:
        import httpx

        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=0.2)
    until(lambda: service._running.total() == 0)
    until(lambda: not service.scheduler._ring)
    assert len(written) < 150
    assert all(user.pins == 0 for user in service.memories.users)
    assert memory_of(client)["tokens"] == 0
    assert not (folder / folder_name("anna") / "journal").exists()
    answer = chat(client, TOLD)  # said again, it is learned
    assert text_of(answer)
    assert settled(client)["tokens"] == len(TOLD) + 1


def test_a_machine_without_memory(running, mind, monkeypatch):
    client = running[0]

    def none_left(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    with monkeypatch.context() as patch:
        patch.setattr(mind, "start", none_left)
        for options in ({}, {"stream": True}):
            refused = post(client, "hello", **options)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "out_of_memory"
    assert post(client, "hello").status_code == 200
    settled(client)
    tries = []

    def sometimes(memory, ids, learn=mind.learn):
        tries.append(1)
        if len(tries) < 3:
            none_left()
        return (yield from learn(memory, ids))

    monkeypatch.setattr(mind, "learn", sometimes)
    chat(client, "more")
    assert settled(client)["tokens"] == len("hello\nmore\n")
    assert len(tries) == 3
    monkeypatch.setattr(mind, "learn", none_left)
    lesson = client.post("/v1/memories/learn", json={"text": "lost", "user": "anna"})
    assert (lesson.status_code, lesson.json()["error"]["code"]) == (503, "not_learned")
    assert memory_of(client)["lessons_failed"] == 1


def test_deleting_cancels_what_is_being_learned(running, mind, monkeypatch):
    """A deletion in the middle of a lesson, and of an answer: neither comes back."""
    client, service, folder = running
    turns = []

    def endless(memory, ids):
        while True:
            turns.append(1)
            time.sleep(0.002)
            yield

    monkeypatch.setattr(mind, "learn", endless)
    chat(client, TOLD)
    until(lambda: turns)
    streamed = []
    body = {"model": "tiny", "prompt": "x", "user": "anna", "max_tokens": 100}
    thread = threading.Thread(target=lambda: streamed.append(client.post("/v1/completions", json=body)))
    thread.start()
    until(lambda: service._running.total() == 1)
    assert client.delete("/v1/memories?user=anna").status_code == 200
    assert not (folder / folder_name("anna")).exists()
    thread.join(20)
    assert streamed[0].status_code == 200
    monkeypatch.undo()
    assert memory_of(client)["tokens"] == 0
    assert list(folder.glob("*deleted*")) == []
    assert Journal(folder / folder_name("anna") / "journal").after(0) == ([], 0)


# The end -------------------------------------------------------------------------------------------------


LEVEL_OPTIONS = ("--chunk_sizes", "8", "16", "--level_lr", "0.5", "0.2")


@pytest.fixture(scope="module", params=[(tiny_llama, LEVEL_OPTIONS), (tiny_hope, ())], ids=list(MINDS))
def served_model(request, tmp_path_factory):
    """Options of the command for a saved model."""
    path = tmp_path_factory.mktemp("model")
    make, options = request.param
    for part in make():
        part.save_pretrained(path)
    return ["--model", str(path), *options]


def start(served_model, memories, *options: str) -> tuple[subprocess.Popen, str]:
    """A server of its own process, and its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "nested_learning", "serve", *served_model),
            *("--memories", memories, "--port", "0", "--name", "tiny", "--temperature", "0"),
            *options,
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line
    return process, line.split()[-1]


@pytest.mark.slow
def test_sigterm_ends_what_runs_saves_and_leaves_the_rest_to_the_journal(served_model, tmp_path):
    process, address = start(served_model, tmp_path, "--max_tokens", "100", "--grace", "3")
    answers, begun = [], time.time()
    with client_of(address) as client:
        chat(client, TOLD, user="ben")
        thread = threading.Thread(target=lambda: answers.append(chat(client, TOLD)))
        thread.start()
        time.sleep(0.1)
        begun = time.time()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert time.time() - begun < 10
        thread.join()
    assert len(text_of(answers[0])) > 50
    process, address = start(served_model, tmp_path)
    with client_of(address) as client:
        for user in ("anna", "ben"):
            assert settled(client, user)["tokens"] == len(TOLD) + 1
    process.kill()
    process.wait()


@dataclass
class Told:
    """What a client knows of its user's memory, in tokens.

    Attributes:
        acknowledged: learned for certain.
        in_flight: of the message that no answer has come to yet.
        is_deleting: whether a deletion has no answer yet.
        answers: number of answers from the present process.
    """

    acknowledged: int = 0
    in_flight: int = 0
    is_deleting: bool = False
    answers: int = 0


def tell_until_killed(address: str, user: str, told: Told, chance: random.Random) -> None:
    """Tell, and now and then delete everything as user 0, until the server is gone."""
    import httpx

    with client_of(address) as client, contextlib.suppress(httpx.TransportError):
        while True:
            if user == "user 0" and chance.random() < 0.2:
                told.is_deleting = True
                client.delete("/v1/memories", params={"user": user}).raise_for_status()
                told.acknowledged, told.is_deleting = 0, False
                continue
            text = f"{user} tells {chance.random()}"
            told.in_flight = len(text) + 1
            chat(client, text, user=user, max_tokens=4)
            told.acknowledged, told.in_flight = told.acknowledged + told.in_flight, 0
            told.answers += 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", MINDS)
def test_kill_9_under_load_loses_at_most_what_is_in_flight(tmp_path, kind):
    """Four clients tell, one of them deletes, and the server is killed at KILL_POINTS random moments (30).

    After each start a user has what was acknowledged, with or without what was in flight; nobody who was
    deleted, and acknowledged so, has anything of before.
    """
    points = int(os.environ.get("KILL_POINTS", "30"))
    chance, ends = random.Random(points), Counter[str]()
    users = {f"user {n}": Told() for n in range(4)}
    for point in range(points + 1):
        process, address = started_process(tmp_path, kind)
        with client_of(address) as client:
            for user, told in users.items():
                tokens = settled(client, user)["tokens"]
                possible = [0, told.acknowledged] if told.is_deleting else [told.acknowledged]
                possible += [told.acknowledged + told.in_flight]
                assert tokens in possible, (point, user, told)
                if told.is_deleting or told.in_flight:
                    what = "deletion" if told.is_deleting else "message"
                    ends[f"{what} {'not ' * (tokens == told.acknowledged)}done"] += 1
                ends["acknowledged tokens kept"] += min(tokens, told.acknowledged)
                users[user] = Told(tokens)
        threads = [
            threading.Thread(target=tell_until_killed, args=(address, user, told, random.Random(point)))
            for user, told in users.items()
        ]
        for thread in threads:
            thread.start()
        answers = chance.randrange(8)  # after some of them, wherever the rest may be
        until(lambda: sum(told.answers for told in users.values()) >= answers)  # noqa: B023
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        for thread in threads:
            thread.join()
    print(points, dict(ends))
    assert ends["message done"] + ends["message not done"] >= points  # it was under load
