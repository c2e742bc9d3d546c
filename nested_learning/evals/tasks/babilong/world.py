"""Stories of bAbI's first three tasks from a simulated world (arXiv 1502.05698), as lists of words.

Four people walk between six places, pick up three things and put them down. A story is sentences of what they
do, with questions in between: where a person is (qa1), where a thing is that somebody carries (qa2), where a
thing was before the place where it is (qa3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PEOPLE = ("daniel", "john", "mary", "sandra")
THINGS = ("apple", "football", "milk")
GOING = ("went to", "journeyed to", "travelled to", "moved to")
GETTING = ("grabbed", "took", "got")
DROPPING = ("dropped", "discarded", "left")
QUESTIONS = 5  # of a story
TASKS = ("qa1", "qa2", "qa3")
_FACTS_BETWEEN = 2  # qa2 and qa3 ask only after more than so many facts
_START = {"john": "kitchen", "mary": "bedroom", "sandra": "garden", "daniel": "hallway"}
_THINGS_START = {"apple": "kitchen", "football": "garden", "milk": "kitchen"}


class Question(NamedTuple):
    """A question and where it stands.

    Attributes:
        after: facts of the story before it.
        words: the question, with its sign.
        answer: a place.
    """

    after: int
    words: list[str]
    answer: str


class Story(NamedTuple):
    """Facts in order, each a sentence of words, and the questions between them."""

    facts: list[list[str]]
    questions: list[Question]


class Chance:
    """Whole numbers from a generator, drawn many at a time."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._drawn: list[float] = []

    def below(self, count: int) -> int:
        """A number from 0 to count − 1, all equally likely."""
        if not self._drawn:
            self._drawn = torch.rand(4096, dtype=torch.float64, generator=self.generator).tolist()
        return int(self._drawn.pop() * count)

    def of(self, choices: tuple[str, ...] | list[str]) -> str:
        """One of several words, all equally likely."""
        return choices[self.below(len(choices))]


class World:
    """Where people and things are, and what a reader of the story knows of it."""

    def __init__(self) -> None:
        self.place = dict(_START)  # of each person
        self.where = dict(_THINGS_START)  # of each thing: a place, or the person who has it
        self.told: dict[str, str] = {}  # of each person that has moved, the place
        self.known: dict[str, str | None] = {}  # of each thing: a place, who has it, or None: not known
        self.history: dict[str, list[str]] = {thing: [] for thing in THINGS}  # known places of each thing

    def go(self, person: str, place: str) -> None:
        """Let a person walk to another place."""
        self.place[person] = self.told[person] = place
        self._remember()

    def get(self, person: str, thing: str) -> None:
        """Let a person take a thing."""
        self.where[thing] = self.known[thing] = person
        self._remember()

    def drop(self, person: str, thing: str) -> None:
        """Let a person put a thing down."""
        self.where[thing] = self.place[person]
        self.known[thing] = self.told.get(person)
        self._remember()

    def gettable(self) -> list[tuple[str, str]]:
        """Every (person, thing) of which the thing lies where the person is."""
        return [(p, t) for p in PEOPLE for t in THINGS if self.where[t] == self.place[p]]

    def droppable(self) -> list[tuple[str, str]]:
        """Every (person, thing) of which the person has the thing."""
        return [(p, t) for p in PEOPLE for t in THINGS if self.where[t] == p]

    def known_place(self, thing: str) -> str | None:
        """Place of a thing as far as the story tells: its own, or that of the person who has it."""
        found = self.known.get(thing)
        return self.told.get(found) if found in PEOPLE else found

    def _remember(self) -> None:
        for thing, places in self.history.items():
            place = self.known_place(thing)
            if place is not None and (not places or places[-1] != place):
                places.append(place)


def story(task: str, chance: Chance) -> Story:
    """A story with five questions.

    Args:
        task: one of `TASKS`.
        chance: decides everything.
    """
    world, since = World(), 0
    facts: list[list[str]] = []
    questions: list[Question] = []
    while len(questions) < QUESTIONS:
        facts.append(_move(world, chance) if task == "qa1" else _act(world, chance))
        since += 1
        if task == "qa1":
            due = since == _FACTS_BETWEEN
        else:
            due = since > _FACTS_BETWEEN and chance.below(2) == 0
        found = _ASKING[task](world, chance) if due else None
        if found is not None:
            questions.append(Question(len(facts), *found))
            since = 0
    return Story(facts, questions)


def _move(world: World, chance: Chance) -> list[str]:
    """A random person walks to a place where she or he is not."""
    person = chance.of(PEOPLE)
    place = chance.of([each for each in PLACES if each != world.place[person]])
    world.go(person, place)
    return [person, *chance.of(GOING).split(), "the", place, "."]


def _act(world: World, chance: Chance) -> list[str]:
    """A walk, or twice as often the taking or putting down of a thing, where that is possible."""
    while True:
        if chance.below(3) == 2:
            return _move(world, chance)
        takes, drops = world.gettable(), world.droppable()
        if not takes + drops:
            continue
        number = chance.below(len(takes) + len(drops))
        person, thing = (takes + drops)[number]
        if number < len(takes):
            world.get(person, thing)
            return [person, chance.of(GETTING), "the", thing, "."]
        world.drop(person, thing)
        return [person, chance.of(DROPPING), "the", thing, "."]


def _where_is_person(world: World, chance: Chance) -> tuple[list[str], str] | None:
    known = [person for person in PEOPLE if person in world.told]
    person = chance.of(known)
    return ["where", "is", person, "?"], world.told[person]


def _where_is_thing(world: World, chance: Chance) -> tuple[list[str], str] | None:
    """A thing that a person whose place is known has with her or him, if there is one."""
    known = [thing for thing in THINGS if world.known.get(thing) in world.told]
    if not known:
        return None
    thing = chance.of(known)
    place = world.known_place(thing)
    assert place is not None
    return ["where", "is", "the", thing, "?"], place


def _where_was_thing(world: World, chance: Chance) -> tuple[list[str], str] | None:
    """A thing that was in two places that are known, if there is one."""
    known = [thing for thing in THINGS if len(world.history[thing]) > 1]
    if not known:
        return None
    thing = chance.of(known)
    before, now = world.history[thing][-2:]
    return ["where", "was", "the", thing, "before", "the", now, "?"], before


_ASKING: dict[str, Callable[[World, Chance], tuple[list[str], str] | None]] = {
    "qa1": _where_is_person,
    "qa2": _where_is_thing,
    "qa3": _where_was_thing,
}


def words() -> list[str]:
    """Every word that a story can hold."""
    given = [*PLACES, *PEOPLE, *THINGS, *GETTING, *DROPPING, *(w for text in GOING for w in text.split())]
    return sorted({*given, "the", ".", "where", "is", "was", "before", "?"})
