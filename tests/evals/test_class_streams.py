"""Class-incremental streams: the scores of labels, the stages, the methods, the figures on forgetting."""

from __future__ import annotations

import csv
import json

import pytest

from nested_learning.evals import find_method, find_task
from nested_learning.evals.data_files import data_folder
from nested_learning.evals.methods.pretrained import Base
from nested_learning.evals.methods.pretrained.base import random_llama
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.tasks.streams.data import StreamProtocol, draw, merged
from nested_learning.evals.tasks.streams.scores import backward_transfer, forgetting, learn_in_turn
from nested_learning.evals.tasks.streams.sources import in_domains, read_clinc, read_csv
from nested_learning.evals.tasks.streams.wording import Wording
from nested_learning.training.data import byte_tokenizer

DOMAINS = {
    "money": ["pay_bill", "pay_bill_later"],
    "food": ["recipe", "calories"],
    "travel": ["book_hotel", "visa"],
}
SMALL = StreamProtocol(tasks=3, train=4, queries=3, between=1, tuning_tasks=2, validation=2)
WORDING = Wording(Base(None, byte_tokenizer(), None))


@pytest.fixture(scope="module")
def model():
    return random_llama().eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in CLINC150's format, with a training text that is in the test split too."""
    folder = tmp_path_factory.mktemp("clinc")
    intents = [intent for names in DOMAINS.values() for intent in names]

    def pairs(split, count):
        own = [[f"{split} {i} about {intent}", intent] for intent in intents for i in range(count)]
        return [
            *own,
            *([f"The same about {intent}"[: None if split == "train" else 40], intent] for intent in intents),
        ]

    splits = {split: pairs(split, count) for split, count in (("train", 6), ("val", 4), ("test", 5))}
    (folder / "clinc150.json").write_text(json.dumps({**splits, "oos_test": [["what", "oos"]]}))
    (folder / "clinc150_domains.json").write_text(json.dumps(DOMAINS))
    return folder


# -- scores of labels


def test_forgetting_and_backward_transfer():
    matrix = [[0.8], [0.9, 0.6], [0.5, 0.7, 1.0]]
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert forgetting([[0.8]]) is None
    assert backward_transfer([[0.8]]) is None


class LastStageOnly:
    """Knows every query, but says the first label of the last stage to what is from an earlier one."""

    def __init__(self, stages):
        self.stages, self.done = stages, -1

    def learn(self, reading):
        self.done += 1

    def choose(self, prompts, labels):
        stage = self.stages[self.done]
        own = {tuple(WORDING.prompt(query.text)): query.label for query in stage.queries}
        self.labels = list(labels)
        return [own.get(tuple(prompt), stage.labels[0]) for prompt in prompts]


def test_the_matrix_of_a_method_that_forgets(data):
    stages = draw(read_clinc(data), SMALL, 0, tuning=False)
    student = LastStageOnly(stages)
    found = learn_in_turn(student, WORDING, stages)
    assert found["matrix"] == [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0]]
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["forgetting"], found["backward transfer"]) == (1.0, -1.0)
    assert found["confusion"] == [[0.0, 0.0, 1.0]] * 3
    assert (found["right task"], found["last task"]) == (pytest.approx(1 / 3), 1.0)
    assert student.labels == [label for stage in stages for label in stage.labels]


# -- stages


def check_tasks(tasks, protocol, classes):
    labels = [label for task in tasks for label in task.labels]
    assert len(labels) == len(set(labels)) == protocol.tasks * classes
    trained = {example.text.lower() for task in tasks for example in task.train}
    for task in tasks:
        assert {e.label for e in task.train} == {q.label for q in task.queries} == set(task.labels)
        assert len(task.train) == len(set(task.train)) == protocol.train * classes
        assert len(task.asked_between) == protocol.between * classes
        assert {q.label for q in task.asked_between} == set(task.labels)
        assert len(task.queries) == len(set(task.queries))
        assert not trained & {query.text.lower() for query in task.queries}


def test_tasks(data):
    corpus = read_clinc(data)
    for seed in range(20):  # the text of both splits is drawn in some
        tasks = draw(corpus, SMALL, seed, tuning=False)
        check_tasks(tasks, SMALL, 2)
        assert tasks == draw(corpus, SMALL, seed, tuning=False)
        assert {len(task.queries) for task in tasks} == {6}
        assert all("test" in q.text or "same" in q.text for task in tasks for q in task.queries)
        tuning = draw(corpus, SMALL, seed, tuning=True)
        assert [task.domain for task in tuning] == [task.domain for task in tasks][:2]
        assert {len(task.queries) for task in tuning} == {4}
        assert all("val" in q.text or "same" in q.text for task in tuning for q in task.queries)
    assert len({tuple(t.domain for t in draw(corpus, SMALL, seed, tuning=False)) for seed in range(20)}) > 1
    assert {label for labels in corpus.domains.values() for label in labels} >= {"pay bill", "visa"}


def test_the_tasks_of_clinc150():
    folder = data_folder("")
    if not (folder / "clinc150.json").is_file():
        pytest.skip("clinc150.json is neither in NESTED_LEARNING_DATA nor in ../shared/data")
    corpus, protocol = read_clinc(folder), find_task("clinc150").budgets["small"].protocol
    for seed in range(3):
        tasks = draw(corpus, protocol, seed, tuning=False)
        check_tasks(tasks, protocol, 15)
        assert sum(len(task.queries) for task in tasks) == 150


def test_labels_of_a_file_are_divided_by_chance(tmp_path):
    """Each label's texts go to one of three splits, always the same; labels go to parts by the seed."""
    file = tmp_path / "texts.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["label", "text"])
        table.writerows([f"topic_{label}", f"number {n} of {label}"] for label in range(7) for n in range(10))
        table.writerow(["topic_0", "number 0 of 0"])  # a second time
    found = read_csv(file)
    assert found == read_csv(file)
    for label in (f"topic {i}" for i in range(7)):
        parts = [set(found.texts[split][label]) for split in ("train", "val", "test")]
        assert [len(part) for part in parts] == [6, 2, 2]
        assert len(set.union(*parts)) == 10
    first, second = in_domains(found, 3, 0), in_domains(found, 3, 1)
    assert sorted(map(len, first.domains.values())) == [2, 2, 3]
    assert sorted(label for labels in first.domains.values() for label in labels) == sorted(found.domains)
    assert first.domains != second.domains
    assert first.domains == in_domains(found, 3, 0).domains
    task = find_task("classes").at("smoke", data=str(file), tasks=3)
    assert task.missing() is None
    settings = {"depth": 1.0, "pooling": "mean", "shrinkage": 0.5}
    for method in (find_method("class-means"), find_method("kernel-lda")):
        assert 0 <= task.run(method.at(settings), 0)["accuracy"] <= 1
    assert task.constants()["chance"]["accuracy"] == pytest.approx(1 / 7)


def test_a_file_with_splits_keeps_them(tmp_path):
    file = tmp_path / "texts.csv"
    rows = [f"{split} {label},{label},{split}" for split in ("train", "val", "test") for label in "ab"]
    file.write_text("\ufeff" + "\n".join(["text,label,split", *rows]), encoding="utf-8")
    assert read_csv(file).texts["val"] == {"a": ("val a",), "b": ("val b",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,intent\na,b\n", "lacks the columns label"),
        ("text,label\na,b\nc,b\n", "1 labels, expected two or more"),
        ("text,label\na,b\nc,d\n", "no texts of 'b' in"),
        ("text,label,split\na,b,dev\n", "row 1: split is 'dev'"),
        ("text,label\na,b\nc\n", "row 2 has text 'c' and label None"),
        ("text,label\n ,b\n", "row 1 has text ' '"),
        ("", "lacks the columns label, text"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    file = tmp_path / "texts.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(file)
    assert message.split(":")[0] in find_task("classes").at("small", model="random", data=str(file)).missing()


def test_what_a_stream_lacks_is_said(tmp_path):
    (tmp_path / "clinc150.json").write_text("[]")
    (tmp_path / "clinc150_domains.json").write_text("{}")
    (tmp_path / "model").mkdir()
    for task, options, message in (
        ("clinc150", {"model": "random", "data": str(tmp_path / "none")}, "is not there"),
        ("clinc150", {"model": "random", "data": str(tmp_path)}, "are not CLINC150"),
        ("clinc150", {"model": str(tmp_path / "model")}, "holds no model"),
        ("clinc150", {"model": "nobody/nothing"}, "hf download nobody/nothing"),
        ("classes", {"model": "random", "data": "banking"}, "Did you mean 'banking77'"),
        ("classes", {"model": "random", "data": str(tmp_path / "none.csv")}, "is not there"),
    ):
        assert message in find_task(task).at("small", **options).missing()


def test_all_tasks_as_one(data):
    tasks = draw(read_clinc(data), SMALL, 0, tuning=False)
    one = merged(tasks, 0)
    assert sorted(one.train) == sorted(example for task in tasks for example in task.train)
    assert list(one.train) != [example for task in tasks for example in task.train]
    assert len(one.queries) == 18


# -- methods


def test_one_trial_and_its_claims():
    """A method at its first setting; a claim follows the figures of the rows."""
    task = find_task("clinc150").at("smoke")
    method = find_method("three-levels-averaged")
    figures = task.run(method.at(task.grid(method)[0]), 0)
    again = task.run(method.at(task.grid(method)[0]), 0)
    assert {**figures, "seconds": 0} == {**again, "seconds": 0}
    assert set(task.columns) <= set(figures)
    json.dumps(figures, allow_nan=False)
    rows = {
        name: MethodRow(name, {}, {seed: {"accuracy": value + 0.001 * seed} for seed in range(3)})
        for name, value in (("three-levels-averaged", 0.9), ("two-levels-averaged", 0.8), ("one-level", 0.6))
    }
    assert task.claims()[0].judge(rows).verdict == "holds"
    rows["one-level"] = MethodRow("one-level", {}, {seed: {"accuracy": 0.85} for seed in range(3)})
    assert task.claims()[0].judge(rows).verdict == "does not"


def test_settings_are_chosen_on_validation_queries_of_a_shorter_stream(monkeypatch):
    from nested_learning.evals.tasks.streams import stream

    asked = []
    original = stream.draw
    monkeypatch.setattr(stream, "draw", lambda *given: asked.append(given) or original(*given))
    task = find_task("clinc150").at("smoke", tasks=3, tuning_tasks=2)
    figures = task.tune(find_method("no-adaptation"), 1000)
    assert list(figures) == [task.headline]
    assert asked[-1][2:] == (1000, True)


def test_joint_learns_all_at_once(monkeypatch):
    task = find_task("clinc150").at("smoke")
    figures = task.run(find_method("joint").at({"lr": 1e-4}), 0)
    assert len(figures["matrix"]) == 1
    assert figures["forgetting"] is None


def test_methods_of_other_kinds_and_settings_are_refused():
    task = find_task("clinc150").at("smoke")
    assert "takes pretrained" in task.accepts(find_method("transformer"))
    assert task.accepts(find_method("ewc")) is None
    with pytest.raises(ValueError, match="settings of 'ewc' are"):
        task.run(find_method("ewc").at({"lr": 1e-4, "penalty": 1.0}), 0)
