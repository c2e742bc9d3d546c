"""Servers in this process, on loopback, with a tiny random model that writes letters."""

from __future__ import annotations

import multiprocessing
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from nested_learning.continual import Level, stack_levels  # noqa: E402
from nested_learning.models import HopeCache, HopeForCausalLM, preset  # noqa: E402
from nested_learning.server.hope_mind import HopeMind  # noqa: E402
from nested_learning.server.level_mind import LevelMind  # noqa: E402
from nested_learning.server.mind import Mind  # noqa: E402
from nested_learning.server.run import make_server  # noqa: E402
from nested_learning.server.settings import ServeSettings  # noqa: E402
from nested_learning.training.data import byte_tokenizer  # noqa: E402

LEVELS = (Level(8, 0.5), Level(16, 0.2))


def tiny_llama(positions: int = 256):
    """A Llama on bytes whose answers are printable and depend on all of the prompt."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    write_letters(model)
    return model, tokenizer


@torch.no_grad()
def write_letters(model) -> None:
    """Let a model write letters alone: every other token's logit is the smallest one."""
    head = model.lm_head.weight
    head.mul_(torch.zeros(len(head), 1).index_fill_(0, torch.arange(97, 123), 1.0))


def tiny_hope(seed: int = 0, **options):
    """A Hope model on bytes, as above: self-modifying Titans with chunks of 8 and 16 tokens."""
    torch.manual_seed(seed)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "mixer_options": {"self_modifying_titans": {"chunk_size": 8, "projection_chunk_size": 16}},
        "initializer_scale": 2.0,
        "tie_word_embeddings": False,
        **options,
    }
    model = HopeForCausalLM(preset("hope-tiny", **fields)).eval()
    write_letters(model)
    return model, byte_tokenizer()


def make_mind(levels=LEVELS, positions: int = 256, kept_weights: int = 2**30) -> LevelMind:
    model, tokenizer = tiny_llama(positions)
    return LevelMind(lambda: stack_levels(model, tokenizer, levels=levels), kept_weights)


def make_hope_mind(**options) -> HopeMind:
    return HopeMind(*tiny_hope(**options))


MINDS = {"levels": make_mind, "hope": make_hope_mind}


class LevelReader:
    """What a mind of levels is to do, by a learner."""

    def __init__(self, levels=LEVELS) -> None:
        model, tokenizer = tiny_llama()
        self.learner = stack_levels(model, tokenizer, levels=levels)

    @property
    def tokens(self) -> int:
        return self.learner.memory.rows[0].position

    def learn(self, text: str) -> list[float]:
        """Losses of the line's tokens but the first, which is learned."""
        return self.learner.observe(f"{text}\n").tolist()[1:]

    def score(self, text: str) -> list[float]:
        return self.learner.score(text).tolist()[1:]

    def answer(self, prompt: str, tokens: int = 12) -> str:
        return self.learner.generate(prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=257)


class HopeReader:
    """What a Hope mind is to do, by the model alone: it reads one text, to which lines are added."""

    def __init__(self, **options) -> None:
        self.model, self.tokenizer = tiny_hope(**options)
        self.ids = [self.tokenizer.eos_token_id]

    @property
    def tokens(self) -> int:
        return len(self.ids) - 1

    def learn(self, text: str) -> list[float]:
        """As above."""
        found = self.score(f"{text}\n")
        self.ids += self.tokenizer.encode(f"{text}\n", add_special_tokens=False)
        return found

    @torch.no_grad()
    def score(self, text: str) -> list[float]:
        new = self.tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([self.ids + new])
        logits = self.model(ids).logits[0, -len(new) : -1]
        return torch.nn.functional.cross_entropy(logits, ids[0, -len(new) + 1 :], reduction="none").tolist()

    @torch.no_grad()
    def answer(self, prompt: str, tokens: int = 12) -> str:
        ids = torch.tensor([self.ids + self.tokenizer.encode(prompt, add_special_tokens=False)])
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 257}
        cache = HopeCache(self.model.config)
        return self.tokenizer.decode(
            self.model.generate(ids, past_key_values=cache, **options)[0, ids.shape[1] :]
        )


READERS = {"levels": LevelReader, "hope": HopeReader}


@contextmanager
def served(folder: Path, mind: Mind | None = None, **options):
    """The address of a running server, and the service behind it, as (address, service)."""
    options = {"model": "tiny", "temperature": 0.0, "max_tokens": 12, **options}
    settings = ServeSettings(memories=str(folder), port=0, **options)
    started, address = threading.Event(), []

    def on_start(given: str) -> None:
        address.append(given)
        started.set()

    server, bound = make_server(mind or make_mind(), settings, on_start)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        assert started.wait(20), "the server did not start"
        yield address[0], server._service
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive(), "the server did not end"


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])  # else each process would import torch for itself


def _serve(kind: str, folder: Path, started) -> None:
    settings = ServeSettings(model="tiny", memories=str(folder), port=0, temperature=0.0)
    server, bound = make_server(MINDS[kind](), settings, started.send)
    server.run(sockets=[bound])


def started_process(folder: Path, kind: str):
    """A server in a process of its own, which can be killed, and its address."""
    address, started = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_serve, args=(kind, folder, started), daemon=True)
    process.start()
    started.close()
    assert address.poll(120), "the server did not start"
    return process, address.recv()


class PatientClient(httpx.Client):
    """Sends again what the server has no room for, as clients do."""

    def request(self, *args, **options):
        for _ in range(100):
            response = super().request(*args, **options)
            if response.status_code != 503:
                break
            time.sleep(0.05)
        return response


def client_of(address: str, patient: bool = False):
    return (PatientClient if patient else httpx.Client)(base_url=address, timeout=60)


def conversation(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def chat(client, *texts: str, user: str = "anna", **options) -> dict:
    """Send a conversation; the JSON of the answer."""
    body = {"model": "tiny", "messages": conversation(*texts), "user": user, **options}
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def memory_of(client, user: str = "anna") -> dict:
    return client.get("/v1/memories", params={"user": user}).raise_for_status().json()


def settled(client, user: str = "anna") -> dict:
    """The memory, once all that was told is learned."""
    deadline = time.time() + 20
    while (shown := memory_of(client, user))["pending_tokens"]:
        assert time.time() < deadline, shown
        time.sleep(0.01)
    return shown


def until(condition) -> None:
    """Wait until something has come true."""
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)
