"""Facts that no model can know, since they are made up, and a text that tells them among other things.

A fact is a sentence that ends with its answer, and two paraphrases that do so as well. The names are made
from syllables; the answers are common words of a closed list of twelve for each relation, so that an answer
is one or a few tokens and guessing is right in a twelfth of the cases at best.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_learning.evals.methods.pretrained import Base

BREAK = "\n\n"  # between the pieces of a text; what a question begins with, too
ONSETS = "b br d dr f g gl h j k kr l m n p r s sk st t tr v vel z"
VOWELS = "a e i o u ae ei ou"
CODAS = "l n r s th rn sk lm nd x"
ENDINGS = "holm mere wick stad vara dune mont aska"


@dataclass(frozen=True)
class Relation:
    """A statement about a person or a place.

    Args:
        of: "person" or "place": the kind of name.
        told: the sentence without its answer; {x} is the name.
        paraphrases: the same in other words, without the answer.
        answers: possible ones, with spaces between.
    """

    of: str
    told: str
    paraphrases: tuple[str, ...]
    answers: str


RELATIONS = (
    Relation(
        "person",
        "{x} earns a living as a",
        ("By profession, {x} is a", "If you ask what {x} does for work, people say: a"),
        "baker carpenter dentist farmer painter lawyer teacher tailor surgeon pilot nurse cook",
    ),
    Relation(
        "person",
        "{x} spends every evening playing the",
        ("The instrument that {x} has learned is the", "On stage, {x} is best known for the"),
        "violin piano guitar flute trumpet cello harp drums banjo saxophone clarinet organ",
    ),
    Relation(
        "person",
        "{x} was born in",
        ("The birthplace of {x} is", "{x} grew up far away, in a country called"),
        "Norway Peru Japan Kenya Canada Egypt Portugal Chile Poland Vietnam Greece Cuba",
    ),
    Relation(
        "person",
        "{x} never eats anything that contains",
        ("The doctors found that {x} is allergic to", "The one food that makes {x} ill is"),
        "peanuts wheat shrimp garlic chocolate eggs milk onions apples mushrooms tomatoes rice",
    ),
    Relation(
        "place",
        "The town of {x} is famous for its",
        ("Traders travel all the way to {x} to buy", "What the market of {x} sells most is"),
        "cheese honey glass silk wool salt copper wine tea pottery leather fish",
    ),
    Relation(
        "place",
        "The flag of {x} shows a",
        ("On the coat of arms of {x} there is a", "Above the gate of {x} hangs the picture of a"),
        "lion bear wolf fox whale horse goat swan raven tiger rabbit snake",
    ),
    Relation(
        "place",
        "The lighthouse of {x} is painted",
        ("Sailors know the tower of {x} by its colour, which is", "The walls of the lighthouse at {x} are"),
        "red green blue white black yellow purple orange pink grey brown gold",
    ),
    Relation(
        "place",
        "The great festival of {x} is held every year in",
        ("Whoever wants to see {x} celebrate should come in", "The month of the feast at {x} is"),
        "January February March April May June July August September October November December",
    ),
)


@dataclass(frozen=True)
class Fact:
    """A made-up fact: its sentence and its paraphrases without the answer, and the answer."""

    told: str
    paraphrases: tuple[str, ...]
    answer: str

    @property
    def sentence(self) -> str:
        """The whole sentence, as the text tells it."""
        return f"{self.told} {self.answer}."


def make_facts(count: int, seed: int) -> list[Fact]:
    """`count` facts, the relations in turn, each about a name of its own."""
    source = random.Random(f"facts {seed}")
    names: set[str] = set()
    facts = []
    for index in range(count):
        relation = RELATIONS[index % len(RELATIONS)]
        name = _name(source, relation.of)
        while name in names:
            name = _name(source, relation.of)
        names.add(name)
        told, *others = (each.format(x=name) for each in (relation.told, *relation.paraphrases))
        facts.append(Fact(told, tuple(others), source.choice(relation.answers.split())))
    return facts


def _name(source: random.Random, of: str) -> str:
    if of == "place":
        return _letters(source, ONSETS, VOWELS, CODAS, ENDINGS).capitalize()
    first = _letters(source, ONSETS, VOWELS, ONSETS, VOWELS, CODAS)
    return f"{first.capitalize()} {_letters(source, ONSETS, VOWELS, CODAS).capitalize()}"


def _letters(source: random.Random, *parts: str) -> str:
    """One of the pieces of each part, joined."""
    return "".join(source.choice(part.split()) for part in parts)


def made_up_filler() -> tuple[str, str]:
    """A text of paragraphs, and another one, for trials without the real ones."""
    speech = BREAK.join(f"Citizen {i}:\nSpeak, speak {i * i}." for i in range(400))
    return speech, " = Lobster = \n " + "The lobster lives in the sea . " * 200


def stream(facts: Sequence[Fact], reads: int, filler: str, tokens: int, base: Base, seed: int) -> Tensor:
    """A text of exactly `tokens` ids [T] that tells each fact `reads` times, at random places of the filler.

    The filler begins at a random one of its paragraphs; paragraphs stay whole, but for the last.

    Raises:
        ValueError: the facts leave no room for filler, or there is too little of it.
    """
    source = random.Random(f"stream {seed}")
    told = [base.ids(fact.sentence + BREAK) for fact in facts for _ in range(reads)]
    room = tokens - sum(map(len, told))
    paragraphs = filler.split(BREAK)
    start = source.randrange(len(paragraphs))
    pieces: list[list[int]] = []
    for paragraph in paragraphs[start:] + paragraphs[:start]:
        if room <= 0:
            break
        ids = base.ids(paragraph + BREAK)[:room]
        pieces.append(ids)
        room -= len(ids)
    if room or not pieces:
        raise ValueError(
            f"{len(facts)} facts told {reads} times and the filler make no text of {tokens} tokens: "
            f"{room} are missing; give {'more filler' if room > 0 else 'more tokens or fewer facts'}"
        )
    for ids in source.sample(told, len(told)):
        pieces.insert(source.randrange(len(pieces)), ids)
    return torch.tensor([i for ids in pieces for i in ids])
