"""CLINC150 as a stream of tasks: the domains one after the other, every task with intents of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

INTENTS, DOMAINS = "clinc150.json", "clinc150_domains.json"
SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """An utterance and its intent in words, such as "bill due"."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Share of CLINC150 that is used.

    Args:
        tasks: domains in sequence.
        train: examples of each class.
        queries: queries of each class, asked when all tasks are learned.
        between: those of them that are asked after every task too.
        tuning_tasks: domains in the sequence that a method is tuned on, at most `tasks`.
        validation: queries of each class there; they come from the validation split.
    """

    tasks: int = 5
    train: int = 20
    queries: int = 2
    between: int = 1
    tuning_tasks: int = 3
    validation: int = 2


FULL = Protocol(tasks=10, train=100, queries=30, between=5)


@dataclass(frozen=True)
class Task:
    """One domain: its labels, its training examples in the order of the stream, and its queries.

    The first `between` queries of each class come first in `queries`.
    """

    domain: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    queries: tuple[Example, ...]
    between: int

    @property
    def asked_between(self) -> tuple[Example, ...]:
        """The queries that are asked after every task."""
        return self.queries[: self.between]


@dataclass(frozen=True)
class Corpus:
    """CLINC150 without its out-of-scope part: intents by domain, texts by split and intent (in words)."""

    domains: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, Mapping[str, tuple[str, ...]]]


def words(intent: str) -> str:
    """An intent's name as it is written in text."""
    return intent.replace("_", " ")


def read(folder: Path) -> Corpus:
    """The corpus in a folder: clinc150.json and clinc150_domains.json.

    Raises:
        ValueError: a file is not there, or is not of this format.
    """
    intents, domains = (_json(folder / name) for name in (INTENTS, DOMAINS))
    try:
        by_domain = {domain: tuple(map(words, names)) for domain, names in domains.items()}
        texts = {split: _by_label(intents[split]) for split in SPLITS}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / INTENTS} and {DOMAINS} are not CLINC150: expected the lists train, val and test of "
            f"[text, intent], and a map from domain to intents ({type(error).__name__}: {error})"
        ) from error
    for label in (label for labels in by_domain.values() for label in labels):
        for split in SPLITS:
            if label not in texts[split]:
                raise ValueError(f"{folder / INTENTS} has no examples of {label!r} in {split}")
    return Corpus(by_domain, texts)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: name a folder with {INTENTS} and {DOMAINS} by --data, "
            "or by NESTED_LEARNING_DATA"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _by_label(pairs: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for text, intent in pairs:
        found.setdefault(words(intent), []).append(text)
    return {label: tuple(texts) for label, texts in found.items()}


def draw(corpus: Corpus, protocol: Protocol, seed: int, tuning: bool) -> list[Task]:
    """The tasks of a seed: which domains in which order, which examples in which order, which queries.

    Args:
        corpus: the source of the tasks.
        protocol: numbers of tasks, examples and queries.
        seed: decides all choices.
        tuning: take `tuning_tasks` domains, and the queries from the validation split, not the test split.

    Raises:
        ValueError: the corpus has too few domains or examples.
    """
    if protocol.tasks > len(corpus.domains):
        raise ValueError(f"{protocol.tasks} tasks need as many domains, the corpus has {len(corpus.domains)}")
    chance = random.Random(seed)
    domains = chance.sample(sorted(corpus.domains), protocol.tasks)
    if tuning:
        domains = domains[: protocol.tuning_tasks]
    return [_task(corpus, protocol, domain, chance, tuning) for domain in domains]


def _task(corpus: Corpus, protocol: Protocol, domain: str, chance: random.Random, tuning: bool) -> Task:
    split = "val" if tuning else "test"
    count = protocol.validation if tuning else protocol.queries
    between = min(protocol.between, count)
    train: list[Example] = []
    first: list[Example] = []
    rest: list[Example] = []
    labels = corpus.domains[domain]
    for label in labels:
        chosen = _sample(chance, corpus.texts["train"][label], protocol.train, label)
        seen = {text.lower() for text in chosen}
        unseen = [text for text in corpus.texts[split][label] if text.lower() not in seen]
        asked = [Example(text, label) for text in _sample(chance, unseen, count, label)]
        train += [Example(text, label) for text in chosen]
        first += asked[:between]
        rest += asked[between:]
    chance.shuffle(train)
    return Task(domain, labels, tuple(train), tuple(first + rest), len(first))


def _sample(chance: random.Random, texts: Sequence[str], count: int, label: str) -> list[str]:
    if len(texts) < count:
        raise ValueError(f"{count} examples of {label!r} wanted, the corpus has {len(texts)}")
    return chance.sample(texts, count)


def merged(tasks: Sequence[Task], seed: int) -> Task:
    """All tasks as one, its examples shuffled: what joint training learns."""
    train = [example for task in tasks for example in task.train]
    random.Random(seed).shuffle(train)
    queries = tuple(query for task in tasks for query in task.queries)
    return Task(
        domain="all",
        labels=tuple(label for task in tasks for label in task.labels),
        train=tuple(train),
        queries=queries,
        between=len(queries),
    )
