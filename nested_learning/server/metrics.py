"""Counters for Prometheus. No label ever has a user's name, a key, or a text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "nested_learning_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ServerMetrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}requests", "requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(f"{PREFIX}prompt_tokens", "tokens of prompts", registry=registry)
        self.answer_tokens = Counter(f"{PREFIX}answer_tokens", "tokens of answers", registry=registry)
        self.told_tokens = Counter(f"{PREFIX}told_tokens", "tokens given to be learned", registry=registry)
        self.first_token = Histogram(
            f"{PREFIX}first_token_seconds",
            "time from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.answer = Histogram(
            f"{PREFIX}answer_seconds", "time of whole answers", buckets=SECONDS, registry=registry
        )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(f"{PREFIX}{name}", about, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All numbers in Prometheus's text format."""
        return generate_latest(self._registry)
