"""Servers in this process, on loopback, with a tiny random model that writes letters."""

from __future__ import annotations

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
from nested_learning.server.mind import LevelMind  # noqa: E402
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
        # Only letters can be written: every other token's logit is the smallest one.
        keep = torch.zeros(len(tokenizer), 1)
        keep[97:123] = 1
        model.lm_head.weight.mul_(keep)
    return model, tokenizer


def make_mind(levels=LEVELS, positions: int = 256, kept_weights: int = 2**30) -> LevelMind:
    model, tokenizer = tiny_llama(positions)
    return LevelMind(lambda: stack_levels(model, tokenizer, levels=levels), kept_weights)


@contextmanager
def served(folder: Path, mind: LevelMind | None = None, **options):
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
