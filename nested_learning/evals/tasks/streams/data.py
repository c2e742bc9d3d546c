"""Labelled texts as a stream of stages, each with labels of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "val", "test")


class Example(NamedTuple):
    """An utterance and its intent in words, such as "bill due"."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class StreamProtocol:
    """Share of the texts that is used.

    Args:
        tasks: stages (domains) in sequence.
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


@dataclass(frozen=True)
class Stage:
    """One stage of a stream: its labels, its training examples in the order of the stream, and its queries.

    The first `between` queries of each class come first in `queries`.
    """

    domain: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    queries: tuple[Example, ...]
    between: int

    @property
    def asked_between(self) -> tuple[Example, ...]:
        """The queries that are asked after every stage."""
        return self.queries[: self.between]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts by split and label, and labels by the domain that they belong to."""

    domains: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, Mapping[str, tuple[str, ...]]]


def draw(corpus: LabelledTexts, protocol: StreamProtocol, seed: int, tuning: bool) -> list[Stage]:
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


def _task(
    corpus: LabelledTexts, protocol: StreamProtocol, domain: str, chance: random.Random, tuning: bool
) -> Stage:
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
    return Stage(domain, labels, tuple(train), tuple(first + rest), len(first))


def _sample(chance: random.Random, texts: Sequence[str], count: int, label: str) -> list[str]:
    if len(texts) < count:
        raise ValueError(f"{count} examples of {label!r} wanted, the corpus has {len(texts)}")
    return chance.sample(texts, count)


def merged(tasks: Sequence[Stage], seed: int) -> Stage:
    """All tasks as one, its examples shuffled: what joint training learns."""
    train = [example for task in tasks for example in task.train]
    random.Random(seed).shuffle(train)
    queries = tuple(query for task in tasks for query in task.queries)
    return Stage(
        domain="all",
        labels=tuple(label for task in tasks for label in task.labels),
        train=tuple(train),
        queries=queries,
        between=len(queries),
    )
