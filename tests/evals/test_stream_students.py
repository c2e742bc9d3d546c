"""What learns a stream: examples in the context, class means, retrieval, levels, fine-tuning."""

import pytest
import torch

from nested_learning.continual import Level, Replay
from nested_learning.continual.labels.class_head import HeadSettings
from nested_learning.evals.methods.pretrained import Base, Passage, Reading, Teaching
from nested_learning.evals.methods.pretrained import tuning as tuned
from nested_learning.evals.methods.pretrained.asking import most_probable
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
from nested_learning.evals.methods.pretrained.tuning import (
    ElasticStudent,
    ReplayStudent,
    Steps,
    TunedStudent,
    collate,
    own_copy,
)
from nested_learning.evals.tasks.streams.data import Stage
from nested_learning.evals.tasks.streams.wording import Example, Wording
from nested_learning.training.data import byte_tokenizer

WORDING = Wording(Base(None, byte_tokenizer(), None))


def tiny_llama(dtype=torch.float32):
    return random_llama().to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


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
