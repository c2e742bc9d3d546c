"""Class-incremental streams: the scores of labels, the stages, the methods, the figures on forgetting."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config

from nested_learning.continual import Level, Replay
from nested_learning.continual.labels.class_head import HeadSettings
from nested_learning.evals import find_method, find_task
from nested_learning.evals.data_files import data_folder
from nested_learning.evals.methods.pretrained import Base, Passage, Reading, Teaching
from nested_learning.evals.methods.pretrained import tuning as tuned
from nested_learning.evals.methods.pretrained.asking import View, _keys_and_values, most_probable
from nested_learning.evals.methods.pretrained.base import random_llama
from nested_learning.evals.methods.pretrained.features import Features
from nested_learning.evals.methods.pretrained.method import averaging_levels
from nested_learning.evals.methods.pretrained.students import (
    ClassifierStudent,
    ExampleStudent,
    LevelStudent,
    RetrievalStudent,
    by_itself,
)
from nested_learning.evals.methods.pretrained.trie import Trie
from nested_learning.evals.methods.pretrained.tuning import (
    ElasticStudent,
    ReplayStudent,
    Steps,
    TunedStudent,
    collate,
    own_copy,
)
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.tasks.streams.data import Stage, StreamProtocol, draw, merged
from nested_learning.evals.tasks.streams.scores import backward_transfer, forgetting, learn_in_turn
from nested_learning.evals.tasks.streams.sources import in_domains, read_clinc, read_csv
from nested_learning.evals.tasks.streams.wording import Example, Wording
from nested_learning.training.data import byte_tokenizer

DOMAINS = {
    "money": ["pay_bill", "pay_bill_later"],
    "food": ["recipe", "calories"],
    "travel": ["book_hotel", "visa"],
}
LABELS = [[5, 6, 9], [5, 6, 7, 9], [5, 8, 9], [3, 9]]
SMALL = StreamProtocol(tasks=3, train=4, queries=3, between=1, tuning_tasks=2, validation=2)
WORDING = Wording(Base(None, byte_tokenizer(), None))


def tiny_llama(dtype=torch.float32):
    return random_llama().to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


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


def separately(model, prompt, label):
    """Log-probability of a label alone behind a prompt."""
    logits = model(torch.tensor([[*prompt, *label]])).logits[0]
    return -cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(label), reduction="sum")


@pytest.mark.parametrize("before", [[], [17, 4, 30, 8, 21]])
@pytest.mark.parametrize("labels", [LABELS, [[7]], [[3], [4], [5]]])
def test_a_label_scores_what_it_scores_alone(before, labels):
    model, prompt = tiny_llama(torch.float64), [11, 12, 13]
    context = _keys_and_values(View(model, torch.tensor(before, dtype=torch.long)))
    expected = torch.stack([separately(model, [*before, *prompt], label) for label in labels])
    trie = Trie.of(labels)
    torch.testing.assert_close(trie.scores(model, prompt, context), expected.detach(), rtol=1e-9, atol=1e-9)
    # the context is as it was
    torch.testing.assert_close(trie.scores(model, prompt, context), expected.detach(), rtol=1e-9, atol=1e-9)


def test_learned_positions_and_lower_precision():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = torch.stack([separately(model, [11, 12], label) for label in LABELS]).detach()
    torch.testing.assert_close(Trie.of(LABELS).scores(model, [11, 12]), expected, rtol=1e-4, atol=1e-4)
    found = Trie.of(LABELS).scores(model.to(torch.bfloat16), [11, 12])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


def test_a_trie_shares_beginnings():
    trie = Trie.of(LABELS)
    assert trie.nodes.tolist() == [5, 6, 7, 8, 3]  # neither 5 twice nor any end
    assert trie.depths.tolist() == [0, 1, 2, 1, 0]
    assert trie.lengths.tolist() == [3, 4, 3, 2]


@pytest.mark.parametrize("labels", [[], [[]], [[1, 2], [1]], [[1, 2], [1, 2]]])
def test_labels_must_exclude_each_other(labels):
    with pytest.raises(ValueError, match="none that another begins with"):
        Trie.of(labels)


def test_the_most_probable_label_is_chosen(model):
    labels = [WORDING.label(label) for label in ("pay bill", "pay bill later", "visa")]
    prompt = WORDING.prompt("hello")
    scores = [separately(model, prompt, label).item() for label in labels]
    best = scores.index(max(scores))
    assert most_probable(View(model), [prompt], labels) == [best]
    assert most_probable(View(model), [prompt], labels[::-1]) == [2 - best]


# -- forgetting


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


def some_stage(labels, count=4):
    train = [Example(f"{label} number {i}", label) for i in range(count) for label in labels]
    return Stage("some", tuple(labels), tuple(train), (), 0)


def some_reading(labels, count=4):
    return WORDING.reading(some_stage(labels, count))


def test_the_examples_in_the_context(model):
    student = ExampleStudent(model, 40, kept=1)
    student.learn(some_reading(["abc", "de"]))
    text = "utterance: {0} number 0\nintent: {0}\n"
    everything = ExampleStudent(model, 6144, kept=1)
    everything.learn(some_reading(["abc", "de"]))
    assert everything.context() == WORDING.ids(text.format("abc") + text.format("de"))
    assert student.context() == WORDING.ids(text.format("de"))  # the older one does not fit
    mixed = ExampleStudent(model, 6144, kept=4, order="mixed", seed=1)
    mixed.learn(some_reading(["abc", "de"]))
    assert sorted(mixed.context()) == sorted(i for p in some_reading(["abc", "de"]).passages for i in p.ids)
    with pytest.raises(ValueError, match="order must be"):
        ExampleStudent(model, 40, kept=1, order="backwards")


def test_class_means_tell_classes_apart(model):
    labels = ["pay bill", "visa", "recipe"]
    settings = HeadSettings(shrinkage=0.1)
    student = ClassifierStudent(model, Features(model, [0.5]), depth=0.5, pooling="mean", settings=settings)
    for label in labels:
        student.learn(some_reading([label], count=6))
    prompts = [WORDING.prompt(f"{label} number 9") for label in labels]
    assert student.choose(prompts, {label: WORDING.label(label) for label in labels}) == labels


def test_retrieval_has_the_nearest_examples_before_a_prompt(model):
    """Of all examples read, also long ago, those with the largest cosine; the nearest one last."""
    student = RetrievalStudent(model, Features(model, [0.5]), examples=2, depth=0.5)
    readings = [some_reading([label], count=3) for label in ("pay bill", "visa")]
    for reading in readings:
        student.learn(reading)
    passages = [passage for reading in readings for passage in reading.passages]
    features = Features(model, [0.5])
    states = features.of([passage.prompt for passage in passages], 0.5, "mean")
    for index, passage in enumerate(passages):
        with student.active() as view:
            found = view.before(passage.prompt).context.tolist()
        centred = states - states.mean(0)
        near = torch.cosine_similarity(centred, centred[index], dim=-1).argsort(descending=True)[:2]
        assert near[0] == index
        assert found == [*passages[near[1]].ids, *passage.ids]
    labels = [WORDING.label("pay bill"), WORDING.label("visa")]
    with student.active() as view:
        [chosen] = most_probable(view, [passages[0].prompt], labels)
        assert [chosen] == most_probable(view.before(passages[0].prompt), [passages[0].prompt], labels)


def test_features_are_those_of_each_prompt_alone(model):
    prompts = [WORDING.prompt(text) for text in ("a short one", "one somewhat longer", "x", "a short one")]
    features = Features(model, [0.0, 1.0], batch=2)
    for depth, layer in ((0.0, 0), (1.0, 2)):
        states = [
            model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0]
            for prompt in prompts
        ]
        for pooling, pool in (("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1])):
            expected = torch.stack([pool(x) for x in states]).double().detach()
            torch.testing.assert_close(features.of(prompts, depth, pooling), expected, rtol=1e-5, atol=1e-5)


def test_blocks_cut_no_example():
    def packed(passages, size):
        parts = [Passage(tuple(ids), (len(ids) - 1, len(ids)), str(ids[0])) for ids in passages]
        return Reading(tuple(parts), (0, 9)).blocks(size)

    blocks = packed([[1, 1], [2, 2, 2], [3], [4] * 7, [5]], 5)
    expected = [[1, 1, 2, 2, 2], [3, 0, 9, 0, 9], [4] * 5, [4, 4, 5, 0, 9]]
    assert [ids.tolist() for ids, _ in blocks] == expected
    learned = [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0] * 5, [0, 1, 1, 0, 0]]
    assert [mask.int().tolist() for _, mask in blocks] == learned
    assert [ids.tolist() for ids, _ in packed([[1] * 4], 2)] == [[1, 1], [1, 1]]


def test_replaying_levels_read_what_others_read_and_keep_each_example_with_its_label(model):
    passages = tuple(WORDING.example(Example(f"number {n}", "ab"[n % 2])) for n in range(12))
    reading = Reading(passages, WORDING.line_break)
    levels = averaging_levels(Teaching((32, 64, 128), 256), 0.1, [0.1])
    plain = LevelStudent(model, levels, by_itself(32))
    replaying = LevelStudent(model, levels, by_itself(32), replay=Replay(share=0.5, choose="label", piece=32))
    for student in (plain, replaying):
        student.learn(reading)
    (row,) = replaying.learner.memory.rows
    assert row.position == plain.learner.memory.rows[0].position  # the same blocks
    kept = [example for example in row.store.examples if example.label is not None]
    assert len(kept) == len(passages)
    assert [(tuple(e.tokens.tolist()), e.label) for e in kept] == [(p.ids, p.label) for p in passages]
    assert [e.learn.int().tolist() for e in kept] == [p.mask for p in passages]
    with plain.learner.active() as first:
        without = first(torch.tensor([passages[0].ids])).logits
    with replaying.learner.active() as second:
        assert not torch.equal(second(torch.tensor([passages[0].ids])).logits, without)


LABELS_IN_WORDS = {label: WORDING.label(label) for label in ("abc", "de")}
QUERY = [WORDING.prompt("something else")]


def test_levels_leave_the_base_model_alone(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    student = LevelStudent(model, [Level(64, 0.1), Level(128, 0.1)], window=by_itself(64))
    student.learn(some_reading(["abc", "de"]))
    assert student.learner.memory.diff()
    student.choose(QUERY, LABELS_IN_WORDS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_labels_are_what_levels_learn(model, monkeypatch):
    """Each label's tokens once, in whatever block, and nothing else."""
    student, seen = LevelStudent(model, [Level(64, 0.1)], window=by_itself(64)), []
    monkeypatch.setattr(student.learner, "observe", lambda ids, learn_mask: seen.append(ids[learn_mask]))
    stage = some_stage(["abc", "de"], count=5)
    student.learn(WORDING.reading(stage))
    assert torch.cat(seen).tolist() == [t for e in stage.train for t in WORDING.label(e.label)]


def test_labels_are_what_fine_tuning_learns():
    examples = [Example("a", "bc"), Example("def", "g")]
    ids, targets = collate([WORDING.example(example) for example in examples])
    for row, example in enumerate(examples):
        whole, label = list(WORDING.example(example).ids), WORDING.label(example.label)
        assert ids[row, : len(whole) - 1].tolist() == whole[:-1]
        kept = targets[row] != tuned.IGNORED
        assert targets[row][kept].tolist() == label
        assert kept.nonzero().flatten().tolist() == list(range(len(whole) - len(label) - 1, len(whole) - 1))


def test_levels_answer_by_those_that_are_to(model):
    levels = [Level(64, 0.5), Level(128, 0.0, consolidate=0.5)]
    slow = LevelStudent(model, levels, window=by_itself(64), answers=[1])
    slow.learn(some_reading(["abc", "de"], count=5))
    name = "model.layers.0.mlp.up_proj.weight"
    base, delta = model.get_parameter(name), slow.learner.memory.diff(1)[name]
    with slow.active() as view:
        torch.testing.assert_close(view.model.state_dict()[name], base + delta)
    assert not torch.equal(delta, slow.learner.memory.diff(0)[name])


def student_of(kind, base, lr, *more, examples=8):
    return kind(*own_copy(base, "mlp"), Steps(lr, 64, examples), *more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_answers_by_its_average_and_goes_on_from_its_weights(dtype):
    base, reading = tiny_llama(dtype), some_reading(["abc", "de"], count=24)  # 6 steps: one move
    student, plain = (student_of(TunedStudent, base, 1e-2, average) for average in (0.25, None))
    start = [master.clone() for master in plain.masters]
    student.learn(reading)
    with student.active():
        seen = [w.detach().clone() for w in student.parameters]
    first_four = Reading(reading.passages[:32], reading.filler)
    plain.learn(first_four)
    for found, first, after in zip(seen, start, plain.masters, strict=True):
        torch.testing.assert_close(found, (first + 0.25 * (after - first)).to(dtype))
    plain.learn(Reading(reading.passages[32:], reading.filler))
    for weight, master, ours in zip(student.parameters, plain.masters, student.masters, strict=True):
        assert torch.equal(ours, master)
        assert torch.equal(weight, master.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_learns_small_steps_in_any_precision(dtype):
    student = student_of(TunedStudent, tiny_llama(dtype), 1e-5)
    start = [master.clone() for master in student.masters]
    student.learn(some_reading(["abc", "de"]))
    moved = torch.stack(
        [(m - w.float()).abs().max() for m, w in zip(student.masters, student.parameters, strict=True)]
    )
    change = torch.stack([(a - b).abs().mean() for a, b in zip(student.masters, start, strict=True)])
    assert (change > 1e-7).all()
    assert (moved <= (0 if dtype == torch.float32 else 4e-3)).all()


def test_ewc_is_the_sum_of_the_tasks_penalties():
    """The two sums give the gradient of λ/2 Σ_t F_t (θ − θ_t)², computed here from the readings."""
    student = student_of(ElasticStudent, tiny_llama(), 1e-2, 3.0, 1)
    anchors, importances = [], []
    for labels in (["abc", "de"], ["fg", "hij"]):
        reading = some_reading(labels)
        before = [p.clone() for p in student.precision]
        student.learn(reading)
        anchors.append([m.clone() for m in student.masters])
        importances.append([p - b for p, b in zip(student.precision, before, strict=True)])
        kept = reading.first_of_each(1)
        assert len(kept) == 2
        squares = [student.gradients(*collate([example]))[0].square() for example in kept]
        torch.testing.assert_close(importances[-1][0], sum(squares) / 2, rtol=1e-4, atol=1e-9)
    for master in student.masters:
        master.add_(0.1 * torch.randn_like(master)).grad = torch.zeros_like(master)
    student.penalise()
    for i, master in enumerate(student.masters):
        expected = sum(3.0 * F[i] * (master - a[i]) for F, a in zip(importances, anchors, strict=True))
        torch.testing.assert_close(master.grad, expected, rtol=1e-3, atol=1e-6)


def test_replay_mixes_in_what_it_kept():
    student = student_of(ReplayStudent, tiny_llama(), 1e-4, 1)
    old, new = some_reading(["abc", "de"]), some_reading(["fg"], count=10)
    assert [list(batch) for batch in student.passages(old, 8)] == [list(old.passages)]
    student.learn(old)
    for batch in student.passages(new, 8):
        assert {e.label for e in batch} == {"abc", "de", "fg"}
        assert sum(e.label != "fg" for e in batch) == 2


@pytest.mark.parametrize("label", ["abc", "de"])
@pytest.mark.parametrize("kind", ["fine-tuning", "EWC", "replay", "levels"])
def test_what_is_learned_is_answered(kind, label):
    """Each label in turn, so that one of the two answers is not the base model's own."""
    base = tiny_llama()
    student = {
        "fine-tuning": lambda: student_of(TunedStudent, base, 1e-2),
        "EWC": lambda: student_of(ElasticStudent, base, 1e-2, 1.0),
        "replay": lambda: student_of(ReplayStudent, base, 1e-2, 1),
        "levels": lambda: LevelStudent(base, [Level(64, 0.5), Level(128, 0.5)], window=by_itself(64)),
    }[kind]()
    student.learn(some_reading([label], count=40))
    assert student.choose(QUERY, LABELS_IN_WORDS) == [label]


# -- the task


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
