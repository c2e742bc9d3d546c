"""Cost of serving: time to first token, tokens per second of one and of eight clients, a switch of users.

python -m benchmarks.serve [--model NAME] [--dtype TYPE] [--rank R] [--json FILE] [--quick]

One client and eight are compared with `Learner.generate` in the same process, in turns; each of the eight is
a user with a memory of its own. MODEL is smollm2, random, a folder, or a downloaded name of the hub.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import parser, record, show
from benchmarks.serve_load import TEXT
from nested_learning._files import MIB
from nested_learning.continual import Level, stack_levels
from nested_learning.evals.methods.pretrained import lacking, load_base
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.server.level_mind import LevelMind
from nested_learning.server.settings import ServeSettings

WANTED = {"one client": 0.9, "eight clients": 0.8, "switch, seconds": 0.2}


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


def by_clients(address: str, clients: int, load: Load, what: str) -> dict[str, Any]:
    """What the clients of another process have found; see `serve_load`."""
    script = str(Path(__file__).with_name("serve_load.py"))
    options = [address, str(clients), str(load.tokens), what]
    done = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


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

    found = [max(0.0, step(memory) - step(memory)) for _ in range(8) for memory in memories]
    mind._reader.workspace.keep = mind.kept
    return median(found[2:])


def measured(model: Any, tokenizer: Any, rank: int | None, load: Load) -> dict[str, float]:
    """All figures of one model."""
    from nested_learning.server.run import make_server  # of the extra `serve`

    levels = [Level(chunk, 0.01, rank=rank) for chunk in (32, 128, 512)]
    mind = LevelMind(lambda: stack_levels(model, tokenizer, levels=levels), 16384 * MIB)
    started, address = threading.Event(), []
    with tempfile.TemporaryDirectory() as folder:
        settings = ServeSettings(model="model", memories=folder, port=0, memory_mb=65536, undo=0)
        server, bound = make_server(mind, settings, lambda given: (address.append(given), started.set()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            if not started.wait(60):
                raise RuntimeError("the server has not started within a minute")
            by_clients(address[0], load.clients, load, "tell")
            by_clients(address[0], load.clients, load, "ask")
            return _figures(mind, server._service, address[0], load)
        finally:
            server.should_exit = True
            thread.join()


def _figures(mind: LevelMind, service: Any, address: str, load: Load) -> dict[str, float]:
    learner = mind._make_learner()
    learner.memory.restore(service.memories.users[0].memory)
    ids = torch.tensor(mind.encode(TEXT))
    plain, served, many = [], [], []
    for _ in range(load.repeats):  # in turns, so that a busy moment meets all
        plain.append(in_process(learner, ids, load.tokens))
        found = by_clients(address, 1, load, "ask")
        served.append((found["first"], found["rate"]))
        many.append(by_clients(address, load.clients, load, "ask")["rate"])
    generate, one = (median(rate for _, rate in rows) for rows in (plain, served))
    all_rate = median(many)
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "--model", default=PACKAGED, help="smollm2, random, a folder, or a downloaded name of the hub"
    )
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--rank", type=int, default=0, help="rank of the deltas; 0 for full matrices")
    options.add_argument("--tokens", type=int, default=Load.tokens, help="tokens of each answer")
    given = options.parse_args(argv)
    name = RANDOM if given.quick and given.model == PACKAGED else given.model
    if (problem := lacking(name)) is not None:
        options.error(problem)
    base = load_base(name)
    load = QUICK if given.quick else Load(tokens=given.tokens, repeats=given.repeats or Load.repeats)
    model = base.model.to(getattr(torch, given.dtype))
    figures = measured(model, base.tokenizer, given.rank or None, load)
    rank = given.rank or "full"
    show(
        f"{name}, {given.dtype}, rank {rank}: {load.clients} clients, {load.tokens} tokens each",
        [{"figure": key, "value": value, "wanted": WANTED.get(key)} for key, value in figures.items()],
    )
    described = {"model": name, "dtype": given.dtype, "rank": rank, "load": asdict(load)}
    return record({**described, "figures": figures}, given.json)


if __name__ == "__main__":
    main()
