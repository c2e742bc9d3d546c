"""Many requests: the server grows no further than its budget."""

from __future__ import annotations

import gc
import os
import random
import threading

import pytest

from tests.server.serving import client_of, conversation, make_hope_mind, make_mind, served

USERS, CLIENTS, PARTS = 40, 4, 10


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def ask(address: str, requests: int, seed: int, failures: list) -> None:
    """Requests of all kinds, by random users."""
    chance = random.Random(seed)
    with client_of(address, patient=True) as client:
        for number in range(requests):
            user = f"user {chance.randrange(USERS)}"
            text = f"{chance.random():.6f}"
            kind = chance.randrange(10)
            if kind < 6:
                body = {"model": "tiny", "messages": conversation(text), "user": user, "stream": kind < 3}
                reply = client.post("/v1/chat/completions", json={**body, "max_tokens": 1})
            elif kind < 8:
                reply = client.post("/v1/memories/score", json={"text": text, "user": user})
            elif kind == 8:
                reply = client.post("/v1/memories/undo", json={"user": user})
            elif number % 50:
                reply = client.get("/v1/memories", params={"user": user})
            else:
                reply = client.delete("/v1/memories", params={"user": user})
            if reply.status_code not in (200, 409):
                failures.append(reply.text)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "make", [lambda: make_mind(kept_weights=2**20), make_hope_mind], ids=["levels", "hope"]
)
def test_no_growth_beyond_the_budget(tmp_path, make):
    """SOAK_REQUESTS requests (10,000) by several clients; resident memory after each tenth of them."""
    requests = int(os.environ.get("SOAK_REQUESTS", "10000"))
    with served(tmp_path, make(), most_users=8, undo=2, memory_mb=8) as (address, service):
        sizes, failures = [], []
        for part in range(PARTS):
            count = requests // PARTS // CLIENTS
            threads = [
                threading.Thread(target=ask, args=(address, count, 10 * part + n, failures))
                for n in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            gc.collect()
            sizes.append(resident())
            print(f"{(part + 1) * count * CLIENTS:,} requests: {sizes[-1] / 2**20:.0f} MiB", flush=True)
            assert not failures, failures[:3]
            assert len(service.memories.users) <= 8
            assert service.memories.nbytes <= 8 * 2**20
            assert service._running.total() == 0
        # the first parts fill caches; after them, no more than noise of the allocator
        assert max(sizes[2:]) - sizes[1] < 64 * 2**20, [size // 2**20 for size in sizes]
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) <= USERS * (3 + 3)  # manifest, journal, lock; the memory and two to go back to
