"""Class-incremental CLINC150: the scores of labels, the tasks, the methods, the figures on forgetting."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from benchmarks.pretrained import clinc, clinc_training
from benchmarks.pretrained.__main__ import main
from benchmarks.pretrained.blocks import packed
from benchmarks.pretrained.clinc_contestants import contestants
from benchmarks.pretrained.clinc_data import Example, Protocol, Task, draw, merged, read
from benchmarks.pretrained.clinc_methods import (
    ClassMeans,
    Features,
    InContext,
    Levels,
    Wording,
    first_of_each,
    most_probable,
)
from benchmarks.pretrained.clinc_scores import backward_transfer, forgetting, learn_in_turn
from benchmarks.pretrained.clinc_training import ElasticWeights, FineTuning, Replay, collate
from benchmarks.pretrained.trie import Trie, read_context
from nested_learning.continual import Level
from nested_learning.training.data import byte_tokenizer

DOMAINS = {
    "money": ["pay_bill", "pay_bill_later"],
    "food": ["recipe", "calories"],
    "travel": ["book_hotel", "visa"],
}
LABELS = [[5, 6, 9], [5, 6, 7, 9], [5, 8, 9], [3, 9]]
SMALL = Protocol(tasks=3, train=4, queries=3, between=1, tuning_tasks=2, validation=2)
WORDING = Wording(byte_tokenizer())


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,  # far from uniform
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


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
    context = read_context(model, before) if before else None
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
    labels = ["pay bill", "pay bill later", "visa"]
    prompt = WORDING.prompt("hello")
    scores = [separately(model, prompt, WORDING.label(label)).item() for label in labels]
    best = labels[scores.index(max(scores))]
    assert most_probable(model, WORDING, ["hello"], labels) == [best]
    assert most_probable(model, WORDING, ["hello"], labels[::-1]) == [best]


# -- forgetting


def test_forgetting_and_backward_transfer():
    matrix = [[0.8], [0.9, 0.6], [0.5, 0.7, 1.0]]
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert forgetting([[0.8]]) is None
    assert backward_transfer([[0.8]]) is None


class LastTaskOnly:
    """Knows every query, but says the first label of the last task to what is from an earlier one."""

    def learn(self, task):
        self.task = task

    def predict(self, texts, labels):
        own = {query.text: query.label for query in self.task.queries}
        self.labels = list(labels)
        return [own.get(text, self.task.labels[0]) for text in texts]


def test_the_matrix_of_a_method_that_forgets(data):
    method, tasks = LastTaskOnly(), draw(read(data), SMALL, 0, tuning=False)
    found = learn_in_turn(method, tasks)
    assert found["matrix"] == [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0]]
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["forgetting"], found["backward transfer"]) == (1.0, -1.0)
    assert found["confusion"] == [[0.0, 0.0, 1.0]] * 3
    assert (found["right task"], found["last task"]) == (pytest.approx(1 / 3), 1.0)
    assert method.labels == [label for task in tasks for label in task.labels]


# -- tasks


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
    corpus = read(data)
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
    folder = Path(os.environ.get("NESTED_LEARNING_DATA", "../shared/data"))
    if not (folder / "clinc150.json").is_file():
        pytest.skip("clinc150.json is neither in NESTED_LEARNING_DATA nor in ../shared/data")
    corpus = read(folder)
    for seed in range(3):
        tasks = draw(corpus, Protocol(), seed, tuning=False)
        check_tasks(tasks, Protocol(), 15)
        assert sum(len(task.queries) for task in tasks) == 150


def test_all_tasks_as_one(data):
    tasks = draw(read(data), SMALL, 0, tuning=False)
    one = merged(tasks, 0)
    assert sorted(one.train) == sorted(example for task in tasks for example in task.train)
    assert list(one.train) != [example for task in tasks for example in task.train]
    assert len(one.queries) == 18


# -- methods


def some_task(labels, count=4):
    train = [Example(f"{label} number {i}", label) for i in range(count) for label in labels]
    return Task("some", tuple(labels), tuple(train), (), 0)


def test_the_examples_in_the_context(model):
    method = InContext(model, WORDING, kept=1, window=40)
    method.learn(some_task(["abc", "de"]))
    text = "utterance: {0} number 0\nintent: {0}\n"
    everything = InContext(model, WORDING, kept=1)
    everything.learn(some_task(["abc", "de"]))
    assert everything.context() == WORDING.ids(text.format("abc") + text.format("de"))
    assert method.context() == WORDING.ids(text.format("de"))  # the older one does not fit
    none = InContext(model, WORDING, kept=0)
    none.learn(some_task(["abc"]))
    assert none.context() == []


def test_class_means_tell_classes_apart(model):
    labels = ["pay bill", "visa", "recipe"]
    method = ClassMeans(Features(model, WORDING, [0.5]), depth=0.5, pooling="mean", shrinkage=0.1)
    for label in labels:
        method.learn(some_task([label], count=6))
    assert method.predict([f"{label} number 9" for label in labels], labels) == labels


def test_features_are_those_of_each_prompt_alone(model):
    texts = ["a short one", "one that is somewhat longer", "x", "a short one"]
    features = Features(model, WORDING, [0.0, 1.0], batch=2)
    for depth, layer in ((0.0, 0), (1.0, 2)):
        states = [
            model(torch.tensor([WORDING.prompt(text)]), output_hidden_states=True).hidden_states[layer][0]
            for text in texts
        ]
        for pooling, pool in (("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1])):
            expected = torch.stack([pool(x) for x in states]).double().detach()
            torch.testing.assert_close(features.of(texts, depth, pooling), expected, rtol=1e-5, atol=1e-5)


def test_blocks_cut_no_example():
    blocks = packed([[1, 1], [2, 2, 2], [3], [4] * 7, [5]], 5, [0])
    expected = [[1, 1, 2, 2, 2], [3, 0, 0, 0, 0], [4] * 5, [4, 4, 5, 0, 0]]
    assert [block.tolist() for block in blocks] == expected
    assert [block.tolist() for block in packed([[1] * 4], 2, [0])] == [[1, 1], [1, 1]]


def test_levels_leave_the_base_model_alone(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    method = Levels(model, WORDING, [Level(64, 0.1), Level(128, 0.1)])
    method.learn(some_task(["abc", "de"]))
    assert method.learner.memory.diff()
    method.predict(["x"], ["abc", "de"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_labels_are_what_levels_learn(model, monkeypatch):
    """Each label's tokens once, in whatever block, and nothing else."""
    method, seen = Levels(model, WORDING, [Level(64, 0.1)]), []
    monkeypatch.setattr(method.learner, "observe", lambda ids, learn_mask: seen.append(ids[learn_mask == 1]))
    task = some_task(["abc", "de"], count=5)
    method.learn(task)
    assert torch.cat(seen).tolist() == [t for e in task.train for t in WORDING.label(e.label)]


def test_labels_are_what_fine_tuning_learns():
    ids, targets = collate(WORDING, [Example("a", "bc"), Example("def", "g")])
    for row, example in enumerate((Example("a", "bc"), Example("def", "g"))):
        whole, label = WORDING.example(example), WORDING.label(example.label)
        assert ids[row, : len(whole) - 1].tolist() == whole[:-1]
        kept = targets[row] != clinc_training.IGNORED
        assert targets[row][kept].tolist() == label
        assert kept.nonzero().flatten().tolist() == list(range(len(whole) - len(label) - 1, len(whole) - 1))


def test_levels_answer_by_those_that_are_to(model):
    task = some_task(["abc", "de"], count=5)
    levels = [Level(64, 0.5), Level(128, 0.0, consolidate=0.5)]
    slow = Levels(model, WORDING, levels, answers=[1])
    slow.learn(task)
    name = "model.layers.0.mlp.up_proj.weight"
    base, delta = model.get_parameter(name), slow.learner.memory.diff(1)[name]
    with slow.learner.active(levels=slow.answers) as answering:
        torch.testing.assert_close(answering.state_dict()[name], base + delta)
    seen = []
    slow.learner.active = lambda levels: seen.append(levels) or nullcontext()
    slow.predict(["x"], ["abc", "de"])
    assert seen == [[1]]


def test_fine_tuning_answers_by_its_average_and_goes_on_from_its_weights():
    base, task = tiny_llama(), some_task(["abc", "de"], count=24)  # 6 batches: the average moves once
    method, plain = FineTuning(base, WORDING, lr=1e-2, average=0.25), FineTuning(base, WORDING, lr=1e-2)
    start = [master.clone() for master in plain.masters]
    seen = {}

    def asked(model, *_):
        seen["weights"] = [w.detach().clone() for w in method.weights]
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clinc_training, "most_probable", asked)
        method.learn(task)
        method.predict(["x"], ["abc"])
    batches = list(plain.batches(task))
    plain.batches = lambda _: batches[:4]
    plain.learn(task)
    for found, first, after in zip(seen["weights"], start, plain.masters, strict=True):
        torch.testing.assert_close(found, first + 0.25 * (after - first))
    assert all(torch.equal(w, m) for w, m in zip(method.weights, method.masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_learns_small_steps_in_any_precision(dtype):
    base, task = tiny_llama(dtype), some_task(["abc", "de"])
    method = FineTuning(base, WORDING, lr=1e-5)
    method.learn(task)
    moved = torch.stack(
        [(m - w.float()).abs().max() for m, w in zip(method.masters, method.weights, strict=True)]
    )
    start = FineTuning(base, WORDING, lr=1e-5).masters
    change = torch.stack([(a - b).abs().mean() for a, b in zip(method.masters, start, strict=True)])
    assert (change > 1e-7).all()
    assert (moved <= (0 if dtype == torch.float32 else 4e-3)).all()


def test_ewc_is_the_sum_of_the_tasks_penalties():
    """The two sums give the gradient of λ/2 Σ_t F_t (θ − θ_t)², computed here from the tasks."""
    method = ElasticWeights(tiny_llama(), WORDING, lr=1e-2, strength=3.0, fisher=1)
    anchors, importances = [], []
    for labels in (["abc", "de"], ["fg", "hij"]):
        task = some_task(labels)
        before = [p.clone() for p in method.precision]
        method.learn(task)
        anchors.append([m.clone() for m in method.masters])
        importances.append([p - b for p, b in zip(method.precision, before, strict=True)])
        squares = [method.gradients([example])[0].square() for example in first_of_each(task, 1)]
        torch.testing.assert_close(importances[-1][0], sum(squares) / 2, rtol=1e-4, atol=1e-9)
    for master in method.masters:
        master.add_(0.1 * torch.randn_like(master)).grad = torch.zeros_like(master)
    method.penalise()
    for i, master in enumerate(method.masters):
        expected = sum(3.0 * F[i] * (master - a[i]) for F, a in zip(importances, anchors, strict=True))
        torch.testing.assert_close(master.grad, expected, rtol=1e-3, atol=1e-6)


def test_replay_mixes_in_what_it_kept():
    method = Replay(tiny_llama(), WORDING, lr=1e-4, kept=1)
    old, new = some_task(["abc", "de"]), some_task(["fg"], count=10)
    assert list(method.batches(old)) == [list(old.train)]
    method.learn(old)
    for batch in method.batches(new):
        assert {e.label for e in batch} == {"abc", "de", "fg"}
        assert sum(e.label != "fg" for e in batch) == 2


@pytest.mark.parametrize("label", ["abc", "de"])
@pytest.mark.parametrize("kind", ["fine-tuning", "EWC", "replay", "levels"])
def test_what_is_learned_is_answered(kind, label):
    """Each label in turn, so that one of the two answers is not the base model's own."""
    base = tiny_llama()
    method = {
        "fine-tuning": lambda: FineTuning(base, WORDING, lr=1e-2),
        "EWC": lambda: ElasticWeights(base, WORDING, lr=1e-2, strength=1.0),
        "replay": lambda: Replay(base, WORDING, lr=1e-2, kept=1),
        "levels": lambda: Levels(base, WORDING, [Level(64, 0.5), Level(128, 0.5)]),
    }[kind]()
    method.learn(some_task([label], count=40))
    assert method.predict(["something else"], ["abc", "de"]) == [label]


# -- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_quick_run(tmp_path, folder, data):
    """Figures, plot and cache are written whole; a second run repeats the first from its cache."""
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("f", "json"), ("p", "png"), ("c", "json"))}
    line = ["clinc", "--quick", "--seeds", "0", "--model", str(folder), "--data", str(data)]
    line += ["--json", str(files["f"]), "--plot", str(files["p"]), "--cache", str(files["c"])]
    figures = main(line)
    written = json.loads(files["f"].read_text())
    assert written == json.loads(json.dumps(figures))
    part = written["parts"]["clinc"]
    assert [row["method"] for row in part["rows"]] == list(contestants())
    assert all(0 <= row["accuracy"] <= 1 for row in part["rows"])
    assert len(part["claims"]) == len(clinc.COMPARISONS)
    row = {row["method"]: row["accuracy"] for row in part["rows"]}
    assert part["claims"][0]["holds"] == (row["3 levels"] > row["1 level"])
    assert files["p"].read_bytes().startswith(b"\x89PNG")
    results = files["c"].read_text()
    assert main(line)["parts"] == figures["parts"]
    assert files["c"].read_text() == results


def test_an_interrupted_run_goes_on(tmp_path, folder, data, capsys):
    cache = tmp_path / "c.json"
    line = [
        "clinc",
        "--quick",
        "--seeds",
        "0",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--cache",
        str(cache),
    ]
    line += ["--methods", "no examples", "class means"]
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--max_minutes", "1e-9"])
    assert stopped.value.code == 3
    assert "the same command goes on" in capsys.readouterr().out
    rows = main(line)["parts"]["clinc"]["rows"]
    assert [row["method"] for row in rows] == ["no examples", "class means"]


def test_bad_input(tmp_path, folder, data, capsys):
    (tmp_path / "clinc150.json").write_text("[]")
    (tmp_path / "clinc150_domains.json").write_text("{}")
    known = ["--model", str(folder), "--data", str(data)]
    for line, message in (
        (["--max_minutes", "1"], "needs --cache"),
        (["--data", str(tmp_path / "none")], "is not there"),
        (["--data", str(tmp_path)], "are not CLINC150"),
        (["--quick", "--model", str(tmp_path), "--data", str(data)], "holds no model"),
        ([*known, "--methods", "magic"], "no method magic"),
        ([*known, "--seeds", "1000"], "tunes the methods"),
        (known, "5 tasks need as many domains"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["clinc", *line])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
