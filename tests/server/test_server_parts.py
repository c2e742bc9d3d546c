"""The parts of the server by themselves: journal, keys, prefixes, text, turns. None needs a web framework."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_learning.cli.main import main
from nested_learning.server.decoding import AnswerText
from nested_learning.server.folder import Manifest, UserFolder, folder_name, prepare
from nested_learning.server.journal import Entry, Journal
from nested_learning.server.keys import KeyFile, add_key
from nested_learning.server.prefixes import KnownPrefixes, chain
from nested_learning.server.prompt import fitting_ids
from nested_learning.server.scheduler import JobCancelled, Scheduler
from nested_learning.server.settings import ServeSettings
from nested_learning.server.versions import MemoryVersion, begun
from nested_learning.training.data import byte_tokenizer

TOKENIZER = byte_tokenizer()

# Journal -------------------------------------------------------------------------------------------------


def entries(count: int) -> list[Entry]:
    return [
        Entry(n, f"c{n}", (f"text {n}\nwith a line break ü",), (f"h{n}",), None) for n in range(1, count + 1)
    ]


def test_the_journal_gives_back_what_is_not_held_yet(tmp_path):
    journal, written = Journal(tmp_path / "journal"), entries(4)
    for entry in written:
        journal.append(entry)
    assert journal.after(0) == (written, 0)
    assert journal.after(2) == (written[2:], 0)
    journal.compact(3)
    assert journal.after(0) == (written[3:], 0)
    journal.compact(4)
    assert not (tmp_path / "journal").exists()
    assert journal.after(0) == ([], 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_journal_loses_the_damaged_entries_alone(tmp_path_factory, data):
    path, written = tmp_path_factory.mktemp("j") / "journal", entries(4)
    content = b"".join(entry.line() for entry in written)
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(content[:at])
        kept = [
            entry
            for n, entry in enumerate(written)
            if len(b"".join(e.line() for e in written[: n + 1])) - 1 <= at
        ]
    else:
        value = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
        path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        hit = content[:at].count(b"\n")
        kept = [entry for n, entry in enumerate(written) if n != hit]
        if content[at : at + 1] == b"\n":  # two lines have become one
            kept = [entry for entry in kept if entry is not [*written, None][hit + 1]]
    journal = Journal(path)
    assert journal.after(0)[0] == kept
    journal.append(Entry(9, "c", ("more",)))
    assert journal.after(0)[0] == [*kept, Entry(9, "c", ("more",))]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    journal, (first, second) = Journal(tmp_path / "journal"), entries(2)
    journal.append(first)

    def half(file, data, write=os.write):
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="disk is full"):
            journal.append(second)
    assert journal.after(0) == ([first], 0)
    journal.append(second)
    assert journal.after(0) == ([first, second], 0)


# Folder --------------------------------------------------------------------------------------------------


def test_no_user_id_becomes_a_path(tmp_path):
    names = {
        folder_name(user) for user in ("../../etc/passwd", "a/b", "", "\0", "x" * 10_000, "a\ud800", "A", "a")
    }
    assert len(names) == 8
    assert all(len(name) == 40 and name.isalnum() for name in names)


def test_a_manifest_says_if_it_is_damaged(tmp_path):
    folder = UserFolder(tmp_path, folder_name("anna"))
    folder.path.mkdir()
    manifest = Manifest(
        applied=3, current="3-0123abcd.safetensors", undo=[("c", None)], writes=[1, 2], changed=4.5
    )
    manifest.known.add("c", ["h1", "h2"], "h1")
    folder.commit(manifest)
    assert folder.manifest() == manifest
    path = folder.path / "manifest.json"
    text = path.read_text()
    for wrong in (text.replace("0123abcd", "0123abce"), text[:-5], "", "[]", '{"manifest": 3}', "[" * 10_000):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="damaged"):
            folder.manifest()


def test_a_deletion_that_was_cut_off_is_finished(tmp_path, monkeypatch):
    folder = UserFolder(tmp_path, folder_name("anna"))
    folder.path.mkdir()
    folder.commit(Manifest(applied=1))
    folder.journal.append(Entry(2, "c", ("secret",)))
    assert prepare(tmp_path) == [folder_name("anna")]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **options: None)  # killed right after the rename
        folder.delete()
    assert len(list(tmp_path.iterdir())) == 1
    assert prepare(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# Keys ----------------------------------------------------------------------------------------------------


def test_keys(tmp_path):
    path = tmp_path / "keys"
    anna, ben, other = add_key(path, "anna"), add_key(path, "ben"), add_key(path, "anna")
    keys = KeyFile(path)
    assert [keys.user(key) for key in (anna, ben, other, "nl-wrong", "")] == [
        "anna",
        "ben",
        "anna",
        None,
        None,
    ]
    text = path.read_text()
    assert not any(key in text for key in (anna, ben, other))
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("# keys\n" + "\n".join(line for line in text.splitlines() if not line.startswith("ben")))
    assert keys.user(ben) is None  # taken away while the server runs
    assert keys.user(anna) == "anna"
    path.write_text("anna 1234\n")
    with pytest.raises(ValueError, match="line 1 of the file of keys"):
        keys.user(anna)
    for name in ("", "a b", "#x", "x" * 300):
        with pytest.raises(ValueError, match="cannot be in a file of keys"):
            add_key(tmp_path / "others", name)


# Prefixes ------------------------------------------------------------------------------------------------


def turns(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


class Client:
    """Sends conversations; says what is new in each request and which conversation it belongs to."""

    def __init__(self) -> None:
        self.known = KnownPrefixes()

    def send(self, *texts: str, answer: str = "ok") -> tuple[list[str], str]:
        given = turns(*texts)
        place = self.known.place(given, chain("anna", given))
        new = [text for role, text in given[place.known :] if role == "user"]
        all_turns = [*given, ("assistant", answer)]
        hashes = chain("anna", all_turns)
        head = [h for h, (role, _) in zip(hashes, all_turns, strict=True) if role == "user"][-1]
        self.known.add(place.conversation, hashes[place.known :], head)
        return new, place.conversation


def test_each_message_is_new_once():
    client = Client()
    new, first = client.send("a")
    assert new == ["a"]
    new, same = client.send("a", "ok", "b")
    assert (new, same) == (["b"], first)
    new, same = client.send("a", "ok", "b", "ok, but edited by the client ", "c")
    assert (new, same) == (["c"], first)
    assert client.send("a", "ok", "b", "ok")[0] == []  # again, for another answer
    new, other = client.send("a", "ok", "x")  # b was edited: another conversation from here
    assert new == ["x"]
    assert other != first
    assert client.send("b")[0] == ["b"]
    assert client.send("  a\n")[0] == []


def test_hashes_of_two_users_differ():
    assert set(chain("anna", turns("a", "b"))).isdisjoint(chain("ben", turns("a", "b")))
    assert chain("anna", [("user", "ab"), ("user", "c")]) != chain("anna", [("user", "a"), ("user", "bc")])


def test_old_conversations_are_kept_to_go_back_to():
    empty = MemoryVersion(0, None, is_empty=True)
    versions = [MemoryVersion(n, None, f"{n}.safetensors") for n in range(6)]
    past = begun((), "a", empty, 3)
    past = begun(past, "a", versions[1], 3)
    assert past == (("a", empty),)
    for n, name in enumerate("bcd", start=2):
        past = begun(past, name, versions[n], 3)
    assert past == (("b", versions[2]), ("c", versions[3]), ("d", versions[4]))
    unsaved = [MemoryVersion(n, None) for n in range(4)]  # a full disk
    for n, name in enumerate("efgh"):
        past = begun(past, name, unsaved[n], 6)
    assert past == (("g", unsaved[2]), ("h", unsaved[3]))


# Text ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.binary(max_size=10), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_text_stream_gives_the_decoded_text_up_to_a_stop(text, noise, stop):
    tokenizer = TOKENIZER
    ids = list(text.encode() + noise + text[:3].encode())
    stream = AnswerText(tokenizer, stop)
    parts = []
    for token in ids:
        parts.append(stream.add(token))
        if stream.stopped:
            break
    parts.append(stream.end())
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    found = [whole.index(s) for s in stop if s in whole]
    if not noise:
        assert "".join(parts) == (whole[: min(found)] if found else whole)
    given_out = "".join(parts)
    assert not any(s in given_out for s in stop)
    assert stream.stopped or not found


def test_the_oldest_turns_are_left_out():
    tokenizer = TOKENIZER
    messages = [("system", "s"), *turns(*("x" * 10 for _ in range(6)), "last")]
    whole = tokenizer.decode(fitting_ids(tokenizer, messages, 1000, 10))
    assert whole.count("x" * 10) == 6
    cut = tokenizer.decode(fitting_ids(tokenizer, messages, 100, 10))
    assert cut.startswith("System: s\nUser: ")
    assert cut.endswith("User: last\nAssistant:")
    assert len(cut) <= 90
    with pytest.raises(ValueError, match="send a shorter one"):
        fitting_ids(tokenizer, messages, 30, 10)


# Turns ---------------------------------------------------------------------------------------------------


def steps(log: list, name: str, count: int, seconds: float = 0.0):
    for _ in range(count):
        log.append(name)
        time.sleep(seconds)
        yield
    return name


@pytest.fixture
def scheduler():
    made = Scheduler(duty=0.25, kept=8)
    yield made
    made.stop()


def test_users_take_turns(scheduler):
    log: list[str] = []
    jobs = [scheduler.submit("anna", steps(log, "a", 6)), scheduler.submit("anna", steps(log, "A", 3))]
    jobs += [scheduler.submit("ben", steps(log, "b", 6))]
    scheduler.start()
    assert [job.result.result(5) for job in jobs] == ["a", "A", "b"]
    assert "".join(log[:12]) == "abAbabAbabAb"  # a user with two jobs has no more turns than one with one


def test_more_users_than_weights_take_longer_turns():
    scheduler, log = Scheduler(kept=1, turns=4), []
    jobs = [scheduler.submit(name, steps(log, name, 8)) for name in "ab"]
    scheduler.start()
    for job in jobs:
        job.result.result(5)
    scheduler.stop()
    assert "".join(log) == "aaaabbbbaaaabbbb"


def timed(seconds: list[float], count: int):
    for _ in range(count):
        begun_at = time.perf_counter()
        time.sleep(0.005)
        seconds.append(time.perf_counter() - begun_at)
        yield


def test_lessons_get_a_share_of_the_time_and_all_of_it_when_nobody_is_there(scheduler):
    log: list[str] = []
    lessons: list[float] = []
    answers: list[float] = []
    lesson = scheduler.submit("ben", timed(lessons, 60), lambda: False)
    answer = scheduler.submit("anna", timed(answers, 60))
    scheduler.start()
    answer.result.result(20)
    spent = lessons[:]
    assert len(spent) > 8
    assert sum(spent) <= 0.25 * (sum(spent) + sum(answers)) + 2 * max(
        spent
    )  # one of them may be after the last
    lesson.result.result(20)
    assert len(lessons) == 60
    # somebody waits for it: it is that user's work, with the same turns as others
    jobs = [scheduler.submit("ben", steps(log, "L", 20, 0.001), lambda: True)]
    jobs.append(scheduler.submit("anna", steps(log, "a", 20, 0.001)))
    for job in jobs:
        job.result.result(10)
    assert 8 <= log[:20].count("L") <= 12


def test_a_failure_is_its_jobs_own(scheduler):
    def fails():
        yield
        raise MemoryError("no room")

    log: list[str] = []
    bad, good = scheduler.submit("anna", fails()), scheduler.submit("ben", steps(log, "b", 5))
    scheduler.start()
    assert good.result.result(5) == "b"
    with pytest.raises(MemoryError):
        bad.result.result(5)


def test_cancelled_jobs_end_and_close(scheduler):
    closed = threading.Event()

    def forever():
        try:
            while True:
                yield
        finally:
            closed.set()

    job = scheduler.submit("anna", forever())
    scheduler.start()
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result.result(5)
    assert closed.is_set()


def test_a_waiter_that_gives_up_ends_neither_the_thread_nor_its_stop(scheduler):
    async def give_up(job) -> None:
        waiting = asyncio.ensure_future(asyncio.wrap_future(job.result))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    log: list[str] = []
    left = scheduler.submit("anna", steps(log, "a", 3))
    asyncio.run(give_up(left))
    left.cancel()
    other = scheduler.submit("ben", steps(log, "b", 3))
    scheduler.start()
    assert other.result.result(5) == "b"
    asyncio.run(give_up(scheduler.submit("anna", steps(log, "a", 10_000, 0.001))))
    scheduler.stop()


def test_visitors_get_the_lock(scheduler):
    lock = threading.RLock()

    def busy():
        while not done.is_set():
            with lock:
                time.sleep(0.002)
            yield

    done = threading.Event()
    job = scheduler.submit("anna", busy())
    scheduler.start()
    begun_at = time.perf_counter()
    for _ in range(5):
        with scheduler.visiting():
            assert lock.acquire(timeout=5)
            lock.release()
    done.set()
    job.result.result(5)
    assert time.perf_counter() - begun_at < 2


# Settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"learn": "all"},
        {"memories": ""},
        {"duty": 1.0},
        {"top_p": 0.0},
        {"port": 70_000},
        {"grace": 30},
        {"most_users": 0},
        {"add_key": "a"},
    ],
)
def test_settings_out_of_range(options):
    with pytest.raises(ValueError, match=f"{'keys' if 'add_key' in options else next(iter(options))} is"):
        ServeSettings(**{"model": "m", "memories": "f", **options})


@pytest.mark.parametrize(
    ("host", "keys", "trusted"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("127.0.0.1", "file", False),
        ("192.168.0.1", None, False),
        ("example.org", None, False),
    ],
)
def test_the_user_field_is_trusted_on_this_computer_alone(host, keys, trusted):
    assert ServeSettings(model="m", memories="f", host=host, keys=keys).trusts_user_field == trusted


# The command ----------------------------------------------------------------------------------------------


def test_the_command_makes_keys(tmp_path, capsys):
    keys = str(tmp_path / "keys")
    options = ["--model", "m", "--memories", str(tmp_path), "--keys", keys, "--add_key", "anna"]
    assert main(["serve", *options]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyFile(keys).user(key) == "anna"


def test_a_file_of_keys_that_is_no_text(tmp_path):
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xff\xfe")
    for use in (KeyFile, lambda path: add_key(path, "anna")):
        with pytest.raises(ValueError, match=rf"file of keys {keys} is not in UTF-8"):
            use(keys)
    assert keys.read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize("below", ["", "memories"])
def test_a_folder_of_memories_that_cannot_be_one(tmp_path, below):
    from tests.server.serving import make_hope_mind, make_server

    file = tmp_path / "file"
    file.touch()
    options = ServeSettings(model="m", memories=str(file / below), port=0)
    with pytest.raises(OSError, match=r"the folder of memories .* choose another --memories"):
        make_server(make_hope_mind(), options)


def test_the_command_says_what_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nested_learning.cli.serve.find_spec", lambda name: None)
    assert main(["serve", "--model", "m", "--memories", str(tmp_path)]) == 2
    assert "pip install 'nested-learning-torch[serve]'" in capsys.readouterr().err
    assert main(["serve", "--model", "m", "--memories", str(tmp_path), "--learn", "all"]) == 2
    assert "one of user, assistant, both, none" in capsys.readouterr().err
