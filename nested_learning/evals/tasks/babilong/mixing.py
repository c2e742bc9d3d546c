"""Stories hidden among the sentences of a text, as ids of words (BABILong, arXiv 2406.10149)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from nested_learning.evals.fit import IGNORED, TaskBatch
from nested_learning.evals.tasks.babilong.world import TASKS, Chance, Question, Story, story, words
from nested_learning.training.data import load_corpus
from nested_learning.training.data.download import SHAKESPEARE_NAME, given_file

SHORTEST = 10  # words of a sentence that is taken
WORDS_PER_FACT = 8  # a sequence holds a fact for so many words at most
OTHER = "(other)"  # stands for every word that is not in the vocabulary
_MAX_BYTES = 2_000_000


class Texts(NamedTuple):
    """Sentences of a text as ids, those of its last tenth kept for tests.

    Attributes:
        ids: of each word of the vocabulary.
        train, test: sentences.
    """

    ids: dict[str, int]
    train: list[list[int]]
    test: list[list[int]]


def text_here() -> str:
    """Source of the noise: "tinyshakespeare" where NESTED_LEARNING_DATA holds it, otherwise "stdlib"."""
    return "stdlib" if given_file(SHAKESPEARE_NAME) is None else "tinyshakespeare"


@cache
def texts(source: str, vocabulary: int) -> Texts:
    """The sentences of a source; the words of the stories and the most frequent ones of the text have ids.

    Args:
        source: see `load_corpus`.
        vocabulary: number of ids, that of `OTHER` included.

    Raises:
        ValueError: fewer ids than the stories need, or no such source.
    """
    own = words()
    if vocabulary <= len(own):
        raise ValueError(f"vocabulary is {vocabulary}; expected more than the stories' {len(own)} words")
    corpus = load_corpus(source, max_bytes=_MAX_BYTES)
    splits = [
        [sentence for document in documents for sentence in _sentences(document.text)]
        for documents in (corpus.train, corpus.validation)
    ]
    counts = Counter(word for sentence in splits[0] for word in sentence)
    frequent = sorted(counts.keys() - set(own), key=lambda word: (-counts[word], word))
    known = [OTHER, *own, *frequent][:vocabulary]
    ids = {word: number for number, word in enumerate(known)}
    train, test = ([[ids.get(word, 0) for word in each] for each in split] for split in splits)
    return Texts(ids, train, test)


def _sentences(text: str) -> list[list[str]]:
    """Sentences of at least `SHORTEST` words in lower case, each with a full stop at its end."""
    found = (re.findall(r"[a-z']+", part) for part in re.split(r"[.!?]|\n\s*\n", text.lower()))
    return [[*sentence, "."] for sentence in found if len(sentence) >= SHORTEST - 1]


@dataclass(frozen=True)
class Mixer:
    """Draws sequences of stories and noise.

    Args:
        ids: of the words.
        noise: sentences.
        generator: decides everything.
    """

    ids: dict[str, int]
    noise: list[list[int]]
    generator: Generator

    def lessons(self, rows: int, length: int) -> TaskBatch:
        """Sequences [B, T] for training, the tasks in turn; questions that have room are answered.

        The target stands at the question's sign; the answer is read next.
        """
        chance = Chance(self.generator)
        pairs = [self._lesson(TASKS[row % len(TASKS)], length, chance) for row in range(rows)]
        ids, targets = (torch.tensor(each) for each in zip(*pairs, strict=True))
        return TaskBatch(ids, targets)

    def tests(self, task: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Sequences [B, T] that end with one question, and the ids of the answers [B].

        As in BABILong, the question is one of the story's five, the others are left out, and stories with
        more facts than `length` has room for are not taken.
        """
        chance = Chance(self.generator)
        found: list[tuple[list[int], int]] = []
        while len(found) < rows:
            drawn = story(task, chance)
            asked = drawn.questions[chance.below(len(drawn.questions))]
            room = length - self._size(drawn.facts[: asked.after]) - len(asked.words)
            if asked.after <= length // WORDS_PER_FACT and room >= 0:
                items = [self._words(fact) for fact in drawn.facts[: asked.after]]
                mixed = [word for part in self._mixed(items, room, chance) for word in part]
                found.append((mixed + self._words(asked.words), self.ids[asked.answer]))
        ids, answers = zip(*found, strict=True)
        return torch.tensor(ids), torch.tensor(answers)

    def _lesson(self, task: str, length: int, chance: Chance) -> tuple[list[int], list[int]]:
        items: list[list[int]] = []
        while not items:
            items = self._fitting(story(task, chance), length)
        room = length - sum(map(len, items))
        parts = [*self._mixed(items[:-1], room, chance), items[-1]]
        sequence = [word for part in parts for word in part]
        asks = self.ids["?"]
        # The noise holds no question mark, and each is followed by its answer.
        following = [*sequence[1:], IGNORED]
        return sequence, [
            then if word == asks else IGNORED for word, then in zip(sequence, following, strict=True)
        ]

    def _fitting(self, drawn: Story, length: int) -> list[list[int]]:
        """The story up to its last question that has room, with answers; empty if none has."""
        kept: list[list[int]] = []
        items: list[list[int]] = []
        before = 0
        for asked in drawn.questions:
            items += [self._words(fact) for fact in drawn.facts[before : asked.after]]
            items.append(self._answered(asked))
            before = asked.after
            if asked.after <= length // WORDS_PER_FACT and sum(map(len, items)) <= length:
                kept = list(items)
        return kept

    def _answered(self, asked: Question) -> list[int]:
        return self._words([*asked.words, asked.answer])

    def _mixed(self, items: list[list[int]], room: int, chance: Chance) -> list[list[int]]:
        """Items in their order, each before a random sentence of a noise of `room` words, or behind all."""
        noise: list[list[int]] = []
        at = chance.below(len(self.noise))
        while room > 0:
            noise.append(self.noise[at % len(self.noise)][:room])
            room -= len(noise[-1])
            at += 1
        places = sorted(chance.below(len(noise) + 1) for _ in items)
        mixed, item = [], 0
        for place in range(len(noise) + 1):
            while item < len(items) and places[item] == place:
                mixed.append(items[item])
                item += 1
            mixed += noise[place : place + 1]
        return mixed

    def _words(self, given: list[str]) -> list[int]:
        return [self.ids[word] for word in given]

    @staticmethod
    def _size(sentences: list[list[str]]) -> int:
        return sum(map(len, sentences))
