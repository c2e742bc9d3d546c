"""Formal languages, read symbol by symbol (Bhattamishra et al., arXiv 2009.11264; Irie et al., 2310.16076).

A string of the language is read, and after every symbol a class is asked for: whether what was read is in the
language, which symbols may follow, or which brackets are open.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from nested_learning.evals.fit import IGNORED, TaskBatch

PAD, SYMBOLS, CLASSES = 0, 4, 4  # ids: padding, then symbols, then classes
VOCABULARY = 1 + SYMBOLS + CLASSES
Window = tuple[int, int]  # smallest and largest


class Language(ABC):
    """Strings and what is asked after each of their symbols.

    Attributes:
        name: as the tables have it.
        symbols: at most four.
        unary: there is at most one string of a length, so that test and training strings cannot differ.
        blocks: symbols per count, where the original's windows count n instead of symbols; else 1.
    """

    name: str
    symbols: str
    unary: bool = False
    blocks: int = 1

    @abstractmethod
    def draw(self, window: Window, rng: random.Random) -> str:
        """A string with a length in the window, both ends included."""

    @abstractmethod
    def classes(self, text: str) -> list[int]:
        """The class after each symbol, from 0."""


class Parity(Language):
    """Strings of 0 and 1 with an even number of 1; class 1 where so far it is even."""

    name, symbols = "parity", "01"

    def draw(self, window: Window, rng: random.Random) -> str:
        least, most = window
        middle = (least + most) / 2
        stop = 1 - middle / (1 + middle)  # 1 − 2p, with p of each symbol
        while True:
            text = ""
            while len(text) < most and rng.random() >= stop:
                text += rng.choice("01")
            if len(text) < least:
                continue
            if text.count("1") % 2 == 0:
                return text
            if len(text) < most:
                return text + "1"

    def classes(self, text: str) -> list[int]:
        found, even = [], 1
        for symbol in text:
            even ^= symbol == "1"
            found.append(even)
        return found


@dataclass
class Repeated(Language):
    """(w)*: a word any number of times; class 1 where what was read is in the language."""

    name: str
    word: str
    unary = True

    @property
    def symbols(self) -> str:  # type: ignore[override]
        """Symbols of the word, in alphabetical order."""
        return "".join(sorted(set(self.word)))

    def draw(self, window: Window, rng: random.Random) -> str:
        least, most = window
        _check(most // len(self.word) * len(self.word) >= least, self.name, window)
        while True:
            text = self.word * (rng.randint(least, most) // len(self.word))
            if len(text) >= least:
                return text

    def classes(self, text: str) -> list[int]:
        return [int((place + 1) % len(self.word) == 0) for place in range(len(text))]


@dataclass
class Counted(Language):
    """aⁿbⁿ or aⁿbⁿcⁿ: the class is the set of symbols that may follow: a or b, b, (c,) the end."""

    name: str
    symbols: str
    unary = True

    @property
    def blocks(self) -> int:  # type: ignore[override]
        """Blocks of n symbols."""
        return len(self.symbols)

    def draw(self, window: Window, rng: random.Random) -> str:
        least, most = -(-window[0] // self.blocks), window[1] // self.blocks
        _check(1 <= least <= most, self.name, window)
        n = rng.randint(least, most)
        return "".join(symbol * n for symbol in self.symbols)

    def classes(self, text: str) -> list[int]:
        n = len(text) // self.blocks
        # after the first symbols a or b; after the last of block i > 0 its successor
        return [0] * n + [(place + 1) // n for place in range(n, len(text))]


class Shuffle(Language):
    """Shuffle-2: two kinds of brackets, each balanced; the class says which kinds are open, as two bits.

    Strings follow the original's grammar, S → (ᵢ S )ᵢ with 0.5, S S with 0.25, nothing with 0.25, given that
    the length lies in the window.
    """

    name, symbols = "shuffle-2", "()[]"

    def draw(self, window: Window, rng: random.Random) -> str:
        least, most = window
        _check(most // 2 * 2 >= max(2, least), self.name, window)
        while True:
            text = self._derive(most, rng)
            if text is not None and len(text) >= least:
                return text

    @staticmethod
    def _derive(most: int, rng: random.Random) -> str | None:
        """A string of the grammar, or None where it is longer than that."""
        pending, text, owed = ["S"], "", 0  # owed: closing brackets that wait
        while pending:
            symbol = pending.pop()
            if symbol != "S":
                text, owed = text + symbol, owed - 1
                continue
            chance = rng.random()
            if chance < 0.5:
                opened, closed = rng.choice([("(", ")"), ("[", "]")])
                text, owed = text + opened, owed + 1
                pending += [closed, "S"]
            elif chance < 0.75:
                pending += ["S", "S"]
            if len(text) + owed > most:
                return None
        return text

    def classes(self, text: str) -> list[int]:
        round_, square, found = 0, 0, []
        for symbol in text:
            round_ += (symbol == "(") - (symbol == ")")
            square += (symbol == "[") - (symbol == "]")
            found.append(2 * (round_ > 0) + (square > 0))
        return found


LANGUAGES: dict[str, Language] = {
    language.name: language
    for language in (
        Parity(),
        Repeated("(aa)*", "aa"),
        Repeated("(abab)*", "abab"),
        Counted("a^n b^n", "ab"),
        Counted("a^n b^n c^n", "abc"),
        Shuffle(),
    )
}


def strings(
    language: Language, window: Window, count: int, rng: random.Random, without: Collection[str] = ()
) -> list[str]:
    """Distinct strings, as many as there are up to `count`, none of `without`."""
    found: dict[str, None] = {}
    for _ in range(50 * count):
        text = language.draw(window, rng)
        if text not in without:
            found[text] = None
        if len(found) == count:
            break
    return list(found)


def encode(language: Language, texts: Sequence[str]) -> TaskBatch:
    """Strings as ids, padded on the right, and the classes asked: both [B, T]."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), PAD)
    targets = torch.full((len(texts), longest), IGNORED)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor([1 + language.symbols.index(symbol) for symbol in text])
        targets[row, : len(text)] = 1 + SYMBOLS + torch.tensor(language.classes(text))
    return TaskBatch(ids, targets)


def _check(possible: bool, name: str, window: Window) -> None:
    if not possible:
        raise ValueError(
            f"{name} has no string with a length of {window[0]} to {window[1]}; choose a wider window"
        )
