"""Needles: what is drawn against its definition, and how answers are scored."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from nested_learning.evals import MethodRow, find_method
from nested_learning.evals.fit import IGNORED
from nested_learning.evals.methods.models import TrainedModel
from nested_learning.evals.tasks.needle import Needle
from nested_learning.evals.tasks.needle.haystack import KINDS, SENTENCES, NeedleForm, hidden, lessons
from nested_learning.evals.tasks.needle.heat import heat_maps
from nested_learning.evals.tasks.needle.scoring import DEPTHS, score

NEEDLE = re.compile(r"([A-Z])=(\d+);")  # of a key with one letter
ENDLESS = "".join(SENTENCES) * 100


def patterns(form: NeedleForm) -> tuple[str, str]:
    key = f"([A-Z]{{{form.letters}}})"
    return rf"{key}=(\d+);", rf"{key}\?([\d,]+);"


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def text_of(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode()


@pytest.mark.parametrize(
    ("form", "length", "questions"),
    [
        (NeedleForm(), 192, 6),
        (NeedleForm(), 256, 8),
        (NeedleForm(needles=3, letters=2, digits=4), 256, 8),
        (NeedleForm(letters=4, digits=7), 256, 5),  # of 37 bytes each, beside four needles of 13
    ],
)
def test_questions_are_answered_by_the_needles_before_them(
    form: NeedleForm, length: int, questions: int
) -> None:
    batch = lessons(12, length, form, False, seeded())
    needle, question = patterns(form)
    for row, (ids, targets) in enumerate(zip(*batch, strict=True)):
        text = text_of(ids)
        told: dict[str, list[str]] = {}
        asked = [IGNORED] * length
        for found in re.finditer(f"{needle}|{question}", text):
            key, value, about, answer = found.groups()
            if key:
                told.setdefault(key, []).append(value)
            else:
                assert answer.split(",") == told[about]
                for place in range(found.start(4), found.end()):
                    asked[place - 1] = ord(text[place])
        assert targets.tolist() == asked
        assert text.endswith(";")
        assert len(re.findall(question, text)) == questions
        keys, values = len(told), sum(map(len, told.values()))
        assert (keys, values) == [(1, 1), (form.needles, form.needles), (1, form.needles)][row % 3]
        assert re.sub(f"{needle}|{question}", "", text) in ENDLESS


def test_everything_is_to_be_predicted_where_that_is_asked() -> None:
    batch = lessons(3, 128, NeedleForm(), True, seeded())
    assert torch.equal(batch.targets[:, :-1], batch.ids[:, 1:])
    assert bool((batch.targets[:, -1] == IGNORED).all())


@pytest.mark.parametrize("kind", ["single", "multi_key", "multi_value"])
def test_needles_stand_where_they_are_said_to(kind: str) -> None:
    count = 1 if kind == "single" else 4
    form, depths = NeedleForm(), torch.rand(20, count, generator=seeded(1))
    texts = hidden(kind, 1000, depths, form, seeded())
    longest = max(map(len, SENTENCES))
    for row, ids in enumerate(texts.ids):
        text = text_of(ids)
        found = list(NEEDLE.finditer(text))
        assert [each.group(1) for each in found] == [text_of(key) for key in texts.keys[row]]
        assert [each.group(2) for each in found] == [text_of(value) for value in texts.values[row]]
        assert len({each.group(1) for each in found}) == (count if kind == "multi_key" else 1)
        noise = 1000 - count * form.width
        for number, each in enumerate(found):
            before = each.start() - number * form.width
            asked = float(texts.depths[row, number]) * noise
            assert asked - 1 <= before <= asked + longest
            previous = text[each.start() - 1] if each.start() else ";"
            assert previous in " ;" or before == noise  # between sentences


def test_digits_and_letters_are_equally_likely() -> None:
    texts = hidden("multi_key", 400, torch.rand(2000, 4, generator=seeded(1)), NeedleForm(), seeded())
    for drawn, count in ((texts.values, 10), (texts.keys, 26)):
        counts = torch.bincount(drawn.flatten() - drawn.min(), minlength=count).double()
        expected = counts.sum() / count
        # 99.99 % quantiles of chi squared with 9 and 25 degrees of freedom.
        assert float(((counts - expected) ** 2 / expected).sum()) < {10: 33.7, 26: 61.0}[count]


def test_too_short_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for needles"):
        lessons(3, 32, NeedleForm(needles=8), False, seeded())


class Scripted:
    """A reader that answers by a rule from the text so far: the value it would say, and the digits of it."""

    def __init__(self, rule: str, texts: list[str] | None = None) -> None:
        self.rule, self.texts = rule, texts

    def anew(self) -> Scripted:
        return Scripted(self.rule)

    def rows(self, index: Tensor) -> Scripted:
        assert self.texts is not None
        return Scripted(self.rule, [self.texts[row] for row in index.tolist()])

    def read(self, ids: Tensor) -> Tensor:
        new = [text_of(each) for each in ids]
        self.texts = new if self.texts is None else [a + b for a, b in zip(self.texts, new, strict=True)]
        return torch.tensor([[ord(self._next(text))] for text in self.texts])

    def _next(self, text: str) -> str:
        asked = re.search(r"([A-Z])\?([\d,]*)$", text)
        if asked is None:
            return " "
        told = NEEDLE.findall(text)
        if self.rule == "first":
            values = [told[0][1]] * len(told)
        else:
            values = [value for key, value in told if key == asked.group(1)]
        if self.rule == "backwards":
            values = values[::-1]
        *_, begun = asked.group(2).split(",")
        said = values[asked.group(2).count(",")] if len(values) > asked.group(2).count(",") else values[-1]
        return said[len(begun)] if len(begun) < len(said) else ";"


@pytest.mark.parametrize(
    ("rule", "exact"),
    [
        ("right", {"single": 1, "multi_key": 1, "multi_value": 1, "multi_query": 1}),
        ("first", {"single": 1, "multi_key": 0.25, "multi_value": 0.25, "multi_query": 0.25}),
        ("backwards", {"single": 1, "multi_key": 1, "multi_value": 1, "multi_query": 1}),
    ],
)
def test_scores_of_readers_that_answer_by_a_rule(rule: str, exact: dict[str, float]) -> None:
    found = score(Scripted(rule), 600, 10, NeedleForm(), seeded(3))  # type: ignore[arg-type]
    assert {kind: found[kind] for kind in KINDS} == exact
    if rule == "right":
        assert found["digits"] == 1
        assert found["heat"] == [1.0] * DEPTHS
    else:
        assert found["digits"] < 1
    if rule == "first":  # of several keys the first is the one that stands highest
        assert found["heat"][0] > found["heat"][-1]


def test_lengths_of_what_is_read_are_those_of_the_option() -> None:
    lengths: Counter[int] = Counter()

    class Counting(Scripted):
        def anew(self) -> Counting:
            return Counting(self.rule)

        def rows(self, index: Tensor) -> Scripted:
            assert self.texts is not None
            lengths.update(len(text) for text in self.texts)
            return super().rows(index)

    form = NeedleForm()
    score(Counting("right"), 600, 5, form, seeded())  # type: ignore[arg-type]
    one, several = form.width, 2 + 4 * (form.digits + 1)
    # The haystack of several keys is read once and asked twice.
    assert lengths == {600 - one: 5, 600 - 4 * one: 10, 600 - several: 5}


def test_a_run_is_decided_by_its_seed_and_has_every_column() -> None:
    task = Needle.at("smoke", steps=2, lengths=[128, 300], piece=100)
    first, again = (task.run(find_method("deltanet"), 0) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert set(Needle.columns) <= set(first)
    assert first["digits"] == first["digits_at_128"]
    assert first["digits_long"] == first["digits_at_300"]
    assert set(first["heat"]) == {"128", "300"}


def test_heat_maps_leave_out_rows_without_one(tmp_path: Path) -> None:
    heat = {"128": [0.5, None, 1.0, 0.0, 0.0], "512": [None] * DEPTHS}
    rows = {
        "one": MethodRow("one", {}, {0: {"heat": heat}, 1: {"heat": heat, "loss": 1.0}}),
        "chance": MethodRow("chance", {}, {0: {"exact": 0.1}}),
        "failed": MethodRow("failed", {}, {}, {0: "diverged"}),
    }
    for chosen in (rows, {"chance": rows["chance"]}):
        path = tmp_path / f"{len(chosen)}.png"
        heat_maps(chosen, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_claims_are_decided_by_the_figures() -> None:
    def row(name: str, *values: tuple[float, float]) -> MethodRow:
        names = ("single", "single_long", "multi_key", "exact_long")
        figures = {
            seed: dict(zip(names, (plain, long, plain / 2, long), strict=True))
            for seed, (plain, long) in enumerate(values)
        }
        return MethodRow(name, {}, figures)

    rows = {
        "hope": row("hope", (1.0, 1.0), (0.99, 0.98), (1.0, 1.0)),
        "hope-in-context": row("hope-in-context", (1.0, 0.4), (0.9, 0.2), (1.0, 0.5)),
        "titans": row("titans", (0.9, 0.5), (0.9, 0.55), (0.9, 0.45)),
        "deltanet": row("deltanet", (0.9, 0.1), (0.9, 0.1), (0.9, 0.2)),
        "transformer": row("transformer", (1.0, 0.0), (1.0, 0.0), (0.95, 0.0)),
    }
    verdicts = [claim.judge(rows).verdict for claim in Needle.at("small").claims()]
    assert verdicts == ["holds", "does not", "holds", "cannot be told here"]


def test_each_method_gets_the_rate_of_its_lowest_loss() -> None:
    task = Needle.at("smoke", lr=0.01, lr_factors=[0.5, 3.0])
    method = find_method("deltanet")
    assert [setting["lr"] for setting in task.grid(method)] == pytest.approx([0.005, 0.03])
    titans = task.grid(find_method("titans"))
    assert titans[2:] == [{"lr": 0.01, "mixer.eta_max": 0.5}]
    stated = TrainedModel("own", "titans", options={"eta_max": 0.1})
    assert len(task.grid(stated)) == 2  # its bound is its own
    assert Needle.at("smoke").grid(find_method("titans")) == [{"lr": 5e-3}]  # one rate: nothing is tuned
    figures = task.tune(method, 0)
    assert figures[task.headline] == -figures["loss"] < 0  # the haystacks of the table are not drawn for it
    assert not any("_at_" in name for name in figures)
    for factors in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"lr_factors is .*; expected one number above 0"):
            Needle.at("small", lr_factors=factors)
