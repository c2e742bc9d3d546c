"""Nothing of one user reaches another: bit-equal answers, and canaries, under many clients at once."""

from __future__ import annotations

import logging
import random
import string
import threading

import pytest

from nested_learning.server.folder import folder_name
from tests.server.serving import (
    MINDS,
    chat,
    client_of,
    conversation,
    make_hope_mind,
    make_mind,
    served,
    settled,
    text_of,
)

LETTERS = string.ascii_lowercase


def one_kept():
    """A mind that keeps the weights of one user ready."""
    return make_mind(kept_weights=1)


def words(seed: int, length: int = 24) -> str:
    return "".join(random.Random(seed).choices(LETTERS + " ", k=length))


def talk(address: str, user: str, rounds: int, seed: int) -> list:
    """Everything that a user gets to see: answers with log-probabilities, scores, what was learned."""
    seen: list = []
    with client_of(address, patient=True) as client:
        for number in range(rounds):
            texts: list[str] = []
            for turn in range(2):
                texts.append(words(1000 * seed + 10 * number + turn))
                options = {"temperature": 1.2, "seed": number, "logprobs": True, "top_logprobs": 2}
                answer = chat(client, *texts, user=user, max_tokens=10, **options)
                seen.append(answer["choices"])
                texts.append(text_of(answer))
            body = {"text": "a text to score", "user": user}
            seen.append(client.post("/v1/memories/score", json=body).raise_for_status().json()["tokens"])
        if rounds > 2:
            undone = client.post("/v1/memories/undo", json={"user": user}).raise_for_status().json()
            seen.append([undone["tokens"], undone["levels"], undone["bytes"]])
        shown = settled(client, user)
        seen.append([shown["tokens"], shown["levels"]])
    return seen


def all_at_once(address: str, users: list[str], rounds: int) -> dict[str, list]:
    """Everything that each of several users at once gets to see."""
    seen: dict[str, list] = {}
    errors: list[BaseException] = []

    def run(user: str, seed: int) -> None:
        try:
            seen[user] = talk(address, user, rounds, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(user, n)) for n, user in enumerate(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return seen


@pytest.mark.parametrize(
    ("make", "rounds"),
    [
        pytest.param(make_mind, 1, id="few"),
        pytest.param(make_hope_mind, 1, id="few-hope"),
        pytest.param(make_mind, 12, id="many", marks=pytest.mark.slow),
        pytest.param(make_hope_mind, 12, id="many-hope", marks=pytest.mark.slow),
        pytest.param(one_kept, 12, id="weights-of-one-user-alone", marks=pytest.mark.slow),
    ],
)
def test_answers_are_bit_equal_whether_others_are_there_or_not(tmp_path, make, rounds):
    users = [f"user {n}" for n in range(8 if rounds > 1 else 4)]
    options = {"most_users": len(users) - 1}  # so that some are put away meanwhile
    with served(tmp_path / "all", make(), **options) as (address, _):
        together = all_at_once(address, users, rounds)
    for n in (0, 3):
        with served(tmp_path / f"alone {n}", make_mind() if make is one_kept else make()) as (address, _):
            assert talk(address, users[n], rounds, n) == together[users[n]]
    assert together[users[0]] != together[users[1]]


def check_canaries(folder, users: dict[str, str], caplog) -> None:
    """No user's canary in the files of another, and none in a name of a file or in the log."""
    for user, canary in users.items():
        assert list(folder.rglob("*.safetensors"))
        for path in folder.rglob("*"):
            assert canary not in str(path)
            assert user not in str(path)
            if path.is_file() and folder_name(user) not in path.parts:
                assert canary.encode() not in path.read_bytes()
        assert canary not in caplog.text


@pytest.mark.parametrize("make", MINDS.values(), ids=list(MINDS))
@pytest.mark.parametrize(
    ("clients", "requests"), [(4, 2), pytest.param(8, 125, marks=pytest.mark.slow)], ids=["few", "1000"]
)
def test_canaries(tmp_path, caplog, make, clients, requests):
    """Each user tells a secret and learns it well; nobody else's answers, scores or files show it.

    An answer cannot quote a canary here: with a random model it would be chance. So the answers of a user
    who was told nothing are compared with those of a server where nobody was.
    """
    caplog.set_level(logging.DEBUG)
    users = {f"teller-{n}": f"CANARY-{n}-{words(n, 12).replace(' ', 'x')}" for n in range(clients - 1)}
    folder = tmp_path / "together"
    with served(folder, make(), most_users=clients - 1) as (address, service):

        def tell(user: str, canary: str) -> None:
            with client_of(address, patient=True) as client:
                for number in range(requests):
                    reply = client.post(
                        "/v1/chat/completions",
                        json={
                            "model": "tiny",
                            "user": user,
                            "messages": conversation(f"{canary} {number}"),
                            "max_tokens": 4,
                            "stream": bool(number % 2),
                        },
                    )
                    assert reply.status_code == 200
                    for other, secret in users.items():
                        assert other == user or secret not in reply.text

        threads = [threading.Thread(target=tell, args=pair) for pair in users.items()]
        for thread in threads:
            thread.start()
        quiet = untold(address, requests)
        for thread in threads:
            thread.join()
        with client_of(address, patient=True) as client:
            for user, canary in users.items():
                chat(client, f"{canary} {requests}", user=user, max_tokens=1)
                shown = settled(client, user)
                assert shown["tokens"] == sum(len(f"{canary} {n}\n") for n in range(requests + 1))
                learned = "".join(token["token"] for token in shown["last_lesson"]["tokens"])
                assert all((secret in learned) == (other == user) for other, secret in users.items())
            assert settled(client, "quiet")["tokens"] == 0
            metrics = client.get("/metrics").text
            assert not any(user in metrics or canary in metrics for user, canary in users.items())
        assert service._running.total() == 0
        check_canaries(folder, users, caplog)
    with served(tmp_path / "alone", make()) as (address, _):
        assert untold(address, requests) == quiet


def untold(address: str, requests: int) -> list:
    """Answers to completions, from which nothing is learned."""
    with client_of(address, patient=True) as client:
        return [
            client.post(
                "/v1/completions",
                json={"model": "tiny", "prompt": words(n), "user": "quiet", "max_tokens": 6, "logprobs": 2},
            )
            .raise_for_status()
            .json()["choices"]
            for n in range(requests)
        ]
