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

from nested_learning.evals.methods.pretrained import Base, Passage, Reading

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
class SentencePair:
    """A sentence and its translation into English."""

    language: str
    sentence: str
    english: str

    @property
    def prompt(self) -> str:
        """The text before the translation."""
        return f"{self.language}: {self.sentence}\nEnglish:"


@dataclass(frozen=True)
class LanguageLesson:
    """Sentence pairs of a language to be read, and others to be tested on."""

    train: list[SentencePair]
    test: list[SentencePair]

    def reading(self, base: Base) -> Reading:
        """Pairs with an empty line after each, of which the English side is learned, to the line's end."""
        line_break = base.ids("\n")
        passages = []
        for pair in self.train:
            prompt, answer = base.ids(pair.prompt), base.ids(f" {pair.english}\n")
            learned = (len(prompt), len(prompt) + len(answer))
            passages.append(Passage((*prompt, *answer, *line_break), learned))
        return Reading(tuple(passages), tuple(line_break))


def kalamang(text: str) -> list[SentencePair]:
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
    pairs: dict[str, SentencePair] = {}
    for row in table:
        sentence = row["Primary_Text"].strip()
        english = max((row["Translated_Text"].strip(), row["alt_translation1"].strip()), key=_englishness)
        if sentence and _englishness(english) > 0 and len(english.split()) in WORDS:
            pairs.setdefault(english, SentencePair("Kalamang", sentence, english))
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


def lessons(
    pairs: Sequence[SentencePair], train: int, test: int, seed: int
) -> tuple[LanguageLesson, LanguageLesson]:
    """A lesson in Kalamang and one in a made-up language; no English sentence is in both, or read and tested.

    Raises:
        ValueError: there are too few pairs.
    """
    count = train + test
    if len(pairs) < 2 * count:
        raise ValueError(f"two lessons of {count} pairs need {2 * count}, there are {len(pairs)}")
    drawn = random.Random(f"pairs {seed}").sample(list(pairs), 2 * count)
    cipher = Cipher(seed)
    other = [SentencePair(cipher.name, cipher(pair.english), pair.english) for pair in drawn[count:]]
    return LanguageLesson(drawn[:train], drawn[train:count]), LanguageLesson(other[:train], other[train:])


def made_up_pairs(count: int = 40) -> list[SentencePair]:
    """Pairs of a language that says little, for trials without data."""
    return [SentencePair("Kalamang", f"ma {i} toni", f"he sees the fish {i}.") for i in range(count)]
