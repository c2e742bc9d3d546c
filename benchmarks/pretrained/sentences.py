"""Sentence pairs of two languages with English: Kalamang, as recorded, and one that is made up.

The made-up language replaces every English word by an invented one, always the same, and turns the order of
the words around.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.pretrained.blocks import packed
from benchmarks.pretrained.invented import encode

ENGLISH = (
    "the a an is are was were of to in on and he she they i you his her their my it for with at not that "
    "this we"
)
INDONESIAN = (
    "yang di dan dia saya itu ada tidak pi su pu dong dorang kita mereka kau bapak mama dengan sama ini "
    "orang ke mau bikin kasih"
)
WORDS = range(3, 11)  # numbers of words of the English side: whole sentences, and soon translated
CONSONANTS, VOWELS, FINALS = "bdfghklmnprstvwz", "aeiou", "nrslk"


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation into English."""

    language: str
    sentence: str
    english: str

    @property
    def prompt(self) -> str:
        """The text before the translation."""
        return f"{self.language}: {self.sentence}\nEnglish:"


@dataclass(frozen=True)
class Lesson:
    """Sentence pairs of a language to be read, and others to be tested on."""

    train: list[Pair]
    test: list[Pair]

    def blocks(self, tokenizer: Any, size: int) -> tuple[Tensor, Tensor]:
        """Ids [T] of the text that is read, and which of them are English [T], to the line's end.

        They are blocks of `size` ids one after the other, filled up with line breaks; only a pair that is
        longer than a block is in two.
        """
        ids, english, line_break = [], [], encode(tokenizer, "\n")
        for pair in self.train:
            prompt, answer = encode(tokenizer, pair.prompt), encode(tokenizer, f" {pair.english}\n")
            ids.append(prompt + answer + line_break)
            english.append([0] * len(prompt) + [1] * len(answer) + [0] * len(line_break))
        return torch.cat(packed(ids, size, line_break)), torch.cat(packed(english, size, [0])).bool()


def kalamang(text: str) -> list[Pair]:
    """The pairs of a CLDF table of examples that have a short English translation, each English side once.

    English may be in either of two columns: it is the one with more common English words than Indonesian
    ones; a row where neither has any is left out.

    Raises:
        ValueError: the table lacks a column.
    """
    table = csv.DictReader(io.StringIO(text))
    columns = {"Primary_Text", "Translated_Text", "alt_translation1"}
    if missing := columns - set(table.fieldnames or ()):
        raise ValueError(f"the table of Kalamang sentences lacks the columns {', '.join(sorted(missing))}")
    pairs: dict[str, Pair] = {}
    for row in table:
        sentence = row["Primary_Text"].strip()
        english = max((row["Translated_Text"].strip(), row["alt_translation1"].strip()), key=_englishness)
        if sentence and _englishness(english) > 0 and len(english.split()) in WORDS:
            pairs.setdefault(english, Pair("Kalamang", sentence, english))
    return list(pairs.values())


def _englishness(text: str) -> int:
    english, other = ENGLISH.split(), INDONESIAN.split()
    return sum((word in english) - (word in other) for word in re.findall(r"[a-z]+", text.lower()))


class Cipher:
    """A made-up language.

    Args:
        seed: another one makes another language.
    """

    name = "Velsan"

    def __init__(self, seed: int) -> None:
        self._source = random.Random(f"language {seed}")
        self._words: dict[str, str] = {}

    def __call__(self, english: str) -> str:
        """The translation: word for word, back to front, with the last character of the sentence."""
        words = re.findall(r"[a-z0-9']+", english.lower())
        end = english[-1] if english[-1] in ".?!" else "."
        return " ".join(map(self._word, reversed(words))).capitalize() + end

    def _word(self, word: str) -> str:
        while word not in self._words:
            syllables = range(1 + (len(word) > 3) + (len(word) > 7))
            new = "".join(self._source.choice(CONSONANTS) + self._source.choice(VOWELS) for _ in syllables)
            new += self._source.choice(FINALS)
            if new not in self._words.values():
                self._words[word] = new
        return self._words[word]


def lessons(pairs: Sequence[Pair], train: int, test: int, seed: int) -> tuple[Lesson, Lesson]:
    """A lesson in Kalamang and one in a made-up language; no English sentence is in both, or read and tested.

    Raises:
        ValueError: there are too few pairs.
    """
    count = train + test
    if len(pairs) < 2 * count:
        raise ValueError(f"two lessons of {count} pairs need {2 * count}, there are {len(pairs)}")
    drawn = random.Random(f"pairs {seed}").sample(list(pairs), 2 * count)
    cipher = Cipher(seed)
    other = [Pair(cipher.name, cipher(pair.english), pair.english) for pair in drawn[count:]]
    return Lesson(drawn[:train], drawn[train:count]), Lesson(other[:train], other[train:])
