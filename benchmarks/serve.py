"""Cost of serving: time to first token, tokens per second of one and of eight clients, a switch of users.

python -m benchmarks.serve [--model NAME] [--rank R] [--json FILE] [--quick]

One client and eight are compared with `Learner.generate` in the same process, in turns; each of the eight is
a user with a memory of its own. MODEL is a folder or a name that transformers can load; without one, a random
Llama of the size of SmolLM2-135M on bytes is measured, which costs what that model costs.
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.harness import parser, record, show
from nested_learning.cli.dialogue import load_pretrained
from nested_learning.continual import Level, stack_levels
from nested_learning.server.mind import LevelMind
from nested_learning.server.run import make_server
from nested_learning.server.settings import MIB, ServeSettings
from nested_learning.training.data import byte_tokenizer

WANTED = {"one client": 0.9, "eight clients": 0.8, "switch, seconds": 0.2}
TEXT = "The lighthouse of Varnholm was built in 1871 by two brothers who had never seen the sea. "


@dataclass(frozen=True)
class Load:
    """Sizes of what is asked.

    Args:
        clients: clients at once.
        tokens: tokens of each answer.
        repeats: answers of each client.
    """

    clients: int = 8
    tokens: int = 64
    repeats: int = 5


QUICK = Load(clients=3, tokens=8, repeats=2)


def random_model(quick: bool) -> tuple[Any, Any]:
    """A random Llama on bytes, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes: dict[str, int] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    if quick:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=49152 if not quick else len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
        **heads,
    )
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


class Client:
    """A user who asks for plain completions, which are never learned, again and again.

    Args:
        address: address of the server.
        user: name of the user.
        load: sizes.
    """

    def __init__(self, address: str, user: str, load: Load) -> None:
        self._http = httpx.Client(base_url=address, timeout=600)
        self._user, self._load = user, load

    def tell(self) -> None:
        """Have the user's memory written to, so that weights differ from those of others."""
        body = {"text": f"{self._user}: {TEXT * 3}", "user": self._user}
        self._http.post("/v1/memories/learn", json=body).raise_for_status()

    def ask(self) -> tuple[float, float, int]:
        """(seconds to the first token, seconds in all, tokens) of one answer."""
        body = {
            "model": "model",
            "prompt": TEXT,
            "user": self._user,
            "max_tokens": self._load.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begun, first, tokens = time.perf_counter(), 0.0, 0
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - begun
                    if '"completion_tokens":' in line:
                        tokens = int(line.split('"completion_tokens":')[1].split(",")[0])
        return first, time.perf_counter() - begun, tokens


def together(clients: list[Client], repeats: int) -> float:
    """Tokens per second of all clients together."""
    counts: list[int] = []

    def run(client: Client) -> None:
        for _ in range(repeats):
            counts.append(client.ask()[2])

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


def in_process(learner: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """(seconds to the first token, tokens per second) of `generate` in this process."""
    begun = time.perf_counter()
    learner.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    made = learner.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return first, (len(made) - len(ids)) / (time.perf_counter() - begun)


def switch_seconds(mind: LevelMind, service: Any) -> float:
    """Seconds that the first token after a switch takes more than the next one, where no weights are kept."""
    memories = [user.memory for user in service.memories.users][-2:]
    mind._reader.workspace.keep = 1
    token = torch.zeros(1, 1, dtype=torch.long, device=mind.model.device)

    def step(memory: Any) -> float:
        begun = time.perf_counter()
        with mind.running(memory) as model:
            model(input_ids=token, logits_to_keep=1)
        return time.perf_counter() - begun

    found = [step(memory) - step(memory) for _ in range(8) for memory in memories]
    mind._reader.workspace.keep = mind.kept
    return median(found[2:])


def measured(model: Any, tokenizer: Any, rank: int | None, load: Load) -> dict[str, float]:
    """All figures of one model."""
    levels = [Level(chunk, 0.01, rank=rank) for chunk in (32, 128, 512)]
    mind = LevelMind(lambda: stack_levels(model, tokenizer, levels=levels), 16384 * MIB)
    started, address = threading.Event(), []
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings(model="model", memories=folder, port=0, memory_mb=65536, undo=0)
        server, bound = make_server(mind, settings, lambda given: (address.append(given), started.set()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            started.wait()
            clients = [Client(address[0], f"user {n}", load) for n in range(load.clients)]
            for client in clients:
                client.tell()
                client.ask()
            return _figures(mind, server._service, clients, load)
        finally:
            server.should_exit = True
            thread.join()


def _figures(mind: LevelMind, service: Any, clients: list[Client], load: Load) -> dict[str, float]:
    learner = mind._make_learner()
    learner.memory.restore(service.memories.users[0].memory)
    ids = torch.tensor(mind.encode(TEXT))
    plain, served, many = [], [], []
    for _ in range(load.repeats):  # in turns, so that a busy moment meets all
        plain.append(in_process(learner, ids, load.tokens))
        first, seconds, tokens = clients[0].ask()
        served.append((first, tokens / seconds))
        many.append(together(clients, 1))
    generate, one, all_rate = (
        median(rate for _, rate in rows) for rows in (plain, served, [(0, r) for r in many])
    )
    return {
        "generate, tokens/s": generate,
        "one client, tokens/s": one,
        "eight clients, tokens/s": all_rate,
        "generate, first token, s": median(first for first, _ in plain),
        "one client, first token, s": median(first for first, _ in served),
        "one client": one / generate,
        "eight clients": all_rate / one,
        "switch, seconds": switch_seconds(mind, service),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="folder or name of a model; default: a random one")
    options.add_argument("--rank", type=int, default=0, help="rank of the deltas; 0 for full matrices")
    given = options.parse_args()
    load = QUICK if given.quick else Load(repeats=given.repeats or Load.repeats)
    model, tokenizer = load_pretrained(given.model) if given.model else random_model(given.quick)
    figures = measured(model, tokenizer, given.rank or None, load)
    show(
        f"{given.model or 'random Llama'}, rank {given.rank or 'full'}, {load.clients} clients, {load.tokens} tokens",
        [{"figure": name, "value": value, "wanted": WANTED.get(name)} for name, value in figures.items()],
    )
    record(given.json, {"load": asdict(load), "rank": given.rank, "figures": figures})


if __name__ == "__main__":
    main()
