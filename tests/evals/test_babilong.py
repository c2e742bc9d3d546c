"""BABILong: stories are answered again from their text alone, noise and facts are told apart again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Generator

from nested_learning.evals import find_method
from nested_learning.evals.fit import IGNORED
from nested_learning.evals.tasks.babilong import Babilong
from nested_learning.evals.tasks.babilong.mixing import SHORTEST, WORDS_PER_FACT, Mixer, text_here, texts
from nested_learning.evals.tasks.babilong.world import (
    DROPPING,
    GETTING,
    PEOPLE,
    PLACES,
    QUESTIONS,
    TASKS,
    THINGS,
    Chance,
    story,
    words,
)

NOISE = "pebble"  # no sentence of the noise of these tests is without it


def chance(seed: int = 0) -> Chance:
    return Chance(Generator().manual_seed(seed))


class Told:
    """What a careful reader knows after some sentences: every place and thing by the words alone."""

    def __init__(self) -> None:
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.lies: dict[str, str | None] = {}
        self.seen: dict[str, list[str]] = {thing: [] for thing in THINGS}

    def hear(self, fact: list[str]) -> None:
        person, verb, *_, what, _ = fact
        if verb in GETTING:
            assert what not in self.holder
            if self.lies.get(what) and person in self.place:
                assert self.lies[what] == self.place[person]
            self.holder[what] = person
        elif verb in DROPPING:
            assert self.holder.pop(what) == person
            self.lies[what] = self.place.get(person)
        else:
            assert self.place.get(person) != what
            self.place[person] = what
        for thing, seen in self.seen.items():
            place = self.where(thing)
            if place and seen[-1:] != [place]:
                seen.append(place)

    def where(self, thing: str) -> str | None:
        if thing in self.holder:
            return self.place.get(self.holder[thing])
        return self.lies.get(thing)

    def answer(self, question: list[str]) -> str | None:
        if question[1] == "was":
            thing, now = question[3], question[6]
            assert self.seen[thing][-1] == now
            return self.seen[thing][-2]
        if question[2] == "the":
            assert question[3] in self.holder
            return self.where(question[3])
        return self.place[question[2]]


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_sentences_before_them(task: str) -> None:
    drawn = chance()
    for _ in range(40):
        told, found, before = story(task, drawn), Told(), 0
        assert len(told.questions) == QUESTIONS
        for question in told.questions:
            for fact in told.facts[before : question.after]:
                found.hear(fact)
            between, before = question.after - before, question.after
            assert between == 2 if task == "qa1" else between >= 3
            assert found.answer(question.words) == question.answer
            assert question.answer in PLACES


def test_people_places_and_sentences_are_as_frequent_as_in_the_world() -> None:
    drawn = chance(1)
    moves = [fact for _ in range(400) for fact in story("qa1", drawn).facts]
    for position, names in ((0, PEOPLE), (-2, PLACES)):
        counts = Counter(fact[position] for fact in moves)
        assert set(counts) == set(names)
        expected = len(moves) / len(names)
        assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())
    verbs = Counter(fact[1] for _ in range(200) for fact in story("qa2", drawn).facts)
    walks = sum(count for verb, count in verbs.items() if verb not in (*GETTING, *DROPPING))
    # A third, and more where nothing can be taken or put down.
    assert 0.33 < walks / verbs.total() < 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("noise") / "text.txt"
    path.write_text(
        " ".join(
            f"{NOISE} {'abcdefghij'[n % 10] * 2} stone" + " river" * (8 + n % 5) + "." for n in range(400)
        )
        + " Too short a sentence."
    )
    return str(path)


def test_sentences_of_the_noise(source: str) -> None:
    found = texts(source, 60)
    inverse = {number: word for word, number in found.ids.items()}
    assert set(words()) < set(found.ids)
    assert len(found.ids) <= 60
    assert len(found.train) == 360  # the sentence in which the text is cut may be lost
    assert len(found.test) in (39, 40)
    for sentence in found.train[:-1] + found.test[1:]:
        assert inverse[sentence[0]] == NOISE
        assert inverse[sentence[-1]] == "."
        assert len(sentence) >= SHORTEST
    small = texts(source, len(words()) + 2)  # the other word, the stories', and the noise's most frequent one
    assert set(small.ids) == {*words(), "river", "(other)"}
    assert small.train[0][0] == small.ids["(other)"]
    with pytest.raises(ValueError, match="vocabulary is 10; expected more than"):
        texts(source, 10)


def split(sequence: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Facts and questions of a mixed sequence, and its sentences of noise (the last one may be cut)."""
    items: list[list[str]] = []
    noise: list[list[str]] = []
    into: list[list[str]] = items
    for before, word in zip(["", *sequence], sequence, strict=False):
        if word in (NOISE, "where") or (word in PEOPLE and before != "is"):
            into = noise if word == NOISE else items
            into.append([])
        into[-1].append(word)
    return items, noise


@pytest.mark.parametrize("length", [64, 200])
def test_lessons_ask_what_the_facts_tell(source: str, length: int) -> None:
    found = texts(source, 60)
    inverse = {number: word for word, number in found.ids.items()}
    batch = Mixer(found.ids, found.train, Generator().manual_seed(0)).lessons(30, length)
    for row in range(30):
        sequence = [inverse[number] for number in batch.ids[row].tolist()]
        items, noise = split(sequence)
        told, facts, answers = Told(), 0, []
        for item in items:
            if item[0] == "where":
                *question, answer = item
                assert told.answer(question) == answer
                answers.append(answer)
            else:
                told.hear(item)
                facts += 1
        assert sequence[-1] == answers[-1]
        assert facts <= length // WORDS_PER_FACT
        assert sum(map(len, items + noise)) == length
        targets = batch.targets[row].tolist()
        assert [inverse[number] for number in targets if number != IGNORED] == answers
        assert [word for word, target in zip(sequence, targets, strict=True) if target != IGNORED] == [
            "?"
        ] * len(answers)


@pytest.mark.parametrize("task", TASKS)
def test_tests_end_with_the_only_question(source: str, task: str) -> None:
    found = texts(source, 60)
    inverse = {number: word for word, number in found.ids.items()}
    ids, answers = Mixer(found.ids, found.test, Generator().manual_seed(0)).tests(task, 20, 300)
    places = []
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        sequence = [inverse[number] for number in row]
        (*facts, question), noise = split(sequence)
        told = Told()
        for fact in facts:
            told.hear(fact)
        assert told.answer(question) == inverse[answer]
        assert sequence[-len(question) :] == question
        assert question[-1] == "?"
        assert sequence.count("?") == 1
        assert sum(map(len, [*facts, question, *noise])) == 300 == len(sequence)
        places += [sequence.index(fact[0]) for fact in facts]
    assert min(places) < 60
    assert max(places) > 100


def test_noise_of_tests_is_not_that_of_trainings() -> None:
    mixer = Mixer(
        {word: n for n, word in enumerate(words())}, [[90] * 12, [91] * 12], Generator().manual_seed(0)
    )
    ids, _ = mixer.tests("qa1", 5, 100)
    assert {90, 91} <= set(ids.flatten().tolist())
    found = texts("stdlib", 400)
    assert len(found.train) > 5 * len(found.test) > 100


def test_text_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NESTED_LEARNING_DATA", raising=False)
    assert text_here() == "stdlib"
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(tmp_path))
    assert text_here() == "stdlib"
    (tmp_path / "tinyshakespeare.txt").write_text("a")
    assert text_here() == "tinyshakespeare"


def test_a_run_is_decided_by_its_seed_and_has_every_column(source: str) -> None:
    task = Babilong.at("smoke", steps=2, lengths=[64, 200], piece=100, text=source)
    first, again = (task.run(find_method("deltanet"), 0) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert set(Babilong.columns) <= set(first)
    assert first["exact_long"] == first["exact_at_200"] == sum(first[f"{t}_at_200"] for t in TASKS) / 3


def test_rows_without_a_run_are_what_guessing_gives() -> None:
    rows = Babilong.at("small").constants()
    assert rows["a random place"]["exact"] == pytest.approx(1 / 6)
    # Of two moves each is asked about as often; a person named before may be asked about too.
    last = rows["the place named last"]
    assert 0.4 < last["qa1"] < 0.6
    assert all(1 / 6 < last[task] < 0.6 for task in TASKS)


def test_each_method_gets_the_best_of_the_rates_that_are_listed(source: str) -> None:
    task = Babilong.at("smoke", lr=0.01, lr_factors=[0.2, 1.0], steps=2, text=source)
    assert task.grid(find_method("deltanet")) == [{"lr": 0.002}, {"lr": 0.01}]
    assert {"lr": 0.01, "mixer.eta_max": 0.5} in task.grid(find_method("titans"))
    figures = task.tune(find_method("deltanet"), 0)
    assert figures["exact_long"] == -figures["loss"] < 0  # the stories of the table are not drawn for it
    assert "2 learning rate(s)" in task.note()


def test_sequences_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 32 words or more"):
        Babilong.at("small", lengths=[16])
