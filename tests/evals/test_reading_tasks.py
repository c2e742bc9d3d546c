"""Tasks `longdoc`, `facts-…k` and `month`: documents, scoring while learning, retrieval, leaks."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nested_learning.continual import Level, Replay, Starts, stack_levels
from nested_learning.continual.rules import resolve_rule
from nested_learning.evals import Ahead, find_method, find_task
from nested_learning.evals.claims import DOES_NOT, HOLDS, UNTOLD
from nested_learning.evals.methods.pretrained import (
    Base,
    Passage,
    PretrainedMethod,
    Reading,
    Teaching,
    learned_starts,
    new_base,
)
from nested_learning.evals.methods.pretrained.asking import View, ask
from nested_learning.evals.methods.pretrained.base import random_llama
from nested_learning.evals.methods.pretrained.learned_starts import starts_for
from nested_learning.evals.methods.pretrained.method import stacked
from nested_learning.evals.methods.pretrained.passages import HAS_BM25, PassageStudent
from nested_learning.evals.methods.pretrained.students import LevelStudent, Student, WindowStudent
from nested_learning.evals.methods.pretrained.tuning import Steps, TunedStudent, own_copy
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.tasks.facts.invented import made_up_filler, make_facts
from nested_learning.evals.tasks.facts_long.task import told_early
from nested_learning.evals.tasks.longdoc import documents as files
from nested_learning.evals.tasks.longdoc import task as longdoc
from nested_learning.evals.tasks.longdoc.readers import READERS, STARTED, DocumentReader
from nested_learning.evals.tasks.month.conversations import TOPICS, two_months
from nested_learning.evals.tasks.month.task import ScoredValues, answers, scored
from nested_learning.training.data import byte_tokenizer

needs_bm25 = pytest.mark.skipif(not HAS_BM25, reason="needs bm25s")
BYTES = Base(None, byte_tokenizer(), None)


@pytest.fixture(scope="module")
def model():
    return random_llama().eval()


@pytest.fixture(scope="module")
def base(model):
    return new_base(model, byte_tokenizer())


# -- claims


def row(name, values):
    return MethodRow(name, figures={seed: {"x": value} for seed, value in enumerate(values)})


def test_an_order_with_a_margin():
    rows = {"a": row("a", [1.00, 1.01, 1.02, 1.03]), "b": row("b", [1.05, 1.07, 1.07, 1.09])}
    for margin, verdict in ((0.0, HOLDS), (0.04, HOLDS), (0.055, UNTOLD), (0.08, DOES_NOT)):
        claim = Ahead("", "", "x", ("a", "b"), higher=False, margin=margin, unit="documents")
        assert claim.judge(rows).verdict == verdict, margin
    assert "4 documents" in claim.judge(rows).because
    worse = Ahead("", "", "x", ("b", "a"), higher=False, margin=-0.08)
    assert worse.judge(rows).verdict == HOLDS  # behind, but by no more than it may be


def test_a_third_of_the_damage():
    rows = {"a": row("a", [0.10, 0.11, 0.12]), "b": row("b", [0.40, 0.42, 0.44])}
    assert Ahead("", "", "x", ("a", "b"), higher=False, factor=3.0).judge(rows).verdict == HOLDS
    assert Ahead("", "", "x", ("a", "b"), higher=False, factor=4.5).judge(rows).verdict == DOES_NOT


def test_figures_with_a_value_for_each_item_are_paired_by_item():
    rows = {"a": row("a", [[1.0, 1.0, 0.0], [1.0, 1.0]]), "b": row("b", [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}
    verdict = Ahead("", "", "x", ("a", "b"), unit="facts").judge(rows)
    assert "+0.6 " in verdict.because  # five pairs: the sixth item is missing in a
    assert "5 facts" in verdict.because
    assert verdict.verdict == UNTOLD


# -- reading that is scored


def test_bytes_of_tokens_and_bits():
    text = "naïve → x😀y"
    ids, read = longdoc.bits_of(text, 100, BYTES)
    assert int(read.sum()) == len(text.encode()) == len(ids)
    losses = torch.full((len(ids),), math.log(4))
    losses[0] = torch.nan
    assert longdoc.bits_per_byte(losses, read) == pytest.approx(2 * (len(ids) - 1) / int(read[1:].sum()))
    assert len(longdoc.bits_of(text, 3, BYTES)[0]) == 3
    with pytest.raises(ValueError, match="two tokens"):
        longdoc.bits_of("x", 5, BYTES)


def test_figures_by_quarter():
    losses = math.log(2) * torch.arange(8.0)
    losses[0] = torch.nan
    document = files.UnreadDocument("p", "1", "tests", "short", ("f",))
    found = longdoc.figures_of(document, losses, torch.ones(8, dtype=torch.long))
    assert [found[name] for name in longdoc.QUARTERS] == pytest.approx([1.0, 2.5, 4.5, 6.5])
    assert found["bits per byte"] == found["tests"] == pytest.approx(4.0)
    long = longdoc.figures_of(
        files.UnreadDocument("p", "1", "docs", "long", ("f",)), losses, torch.ones(8).long()
    )
    assert (long["long"], long["long, last quarter"]) == pytest.approx((4.0, 6.5))
    assert "quarter 1" not in long


def windows_alone(model, ids, positions, overlap, chunk):
    """Losses of each chunk given what a window holds of the ids before it."""
    losses, kept = [], 0
    with torch.no_grad():
        for start in range(0, len(ids), chunk):
            if start + chunk - kept > positions:
                kept = start - overlap
            window = ids[kept : start + chunk]
            logits = model(window[None]).logits[0, :-1]
            found = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            losses.append(found[max(start - kept - 1, 0) :])
    return torch.cat(losses)


def test_a_window_alone_and_steps_of_no_rate_read_alike(model):
    """The baseline's windows, those of levels and those of fine-tuning are the same windows."""
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    expected = windows_alone(model, ids, 64, 32, 16)
    levels = stacked(Teaching((16, 32, 64), 64), [{"chunk": 0, "lr": 0.0}], {})
    own, weights = own_copy(model, "all")
    for student in (
        LevelStudent(model, levels, (64, 32)),
        TunedStudent(own, weights, Steps(0.0, 16, window=(64, 32))),
    ):
        losses = student.read(ids)
        assert losses.shape == ids.shape
        assert losses[0].isnan()
        torch.testing.assert_close(losses[1:], expected, rtol=1e-4, atol=1e-4)


def test_tokens_are_scored_before_they_are_learned(model):
    """What comes later in a chunk does not change the losses of the chunk, and learning helps after it."""
    ids = torch.arange(97, 113).repeat(12)
    alone = stacked(Teaching((16, 32, 64), 64), [{"chunk": 0, "lr": 0.0}], {})
    plain = LevelStudent(model, alone, (64, 32)).read(ids)
    for make in (
        lambda: LevelStudent(
            model, stacked(Teaching((16, 32, 64), 64), [{"chunk": 0, "rule": "adam"}], {"lr": 0.01}), (64, 32)
        ),
        lambda: TunedStudent(*own_copy(model, "mlp"), Steps(0.01, 16, window=(64, 32))),
    ):
        losses = make().read(ids)
        torch.testing.assert_close(losses[1:16], plain[1:16], rtol=1e-4, atol=1e-4)
        changed = ids.clone()
        changed[100:] = 7
        torch.testing.assert_close(make().read(changed)[1:100], losses[1:100])
        assert losses[-64:].mean() < plain[-64:].mean() - 0.2
    with pytest.raises(ValueError, match="asked afterwards"):
        Student(model).read(ids)


def test_levels_as_they_are_laid_out():
    teaching = Teaching((16, 32, 64), 64)
    fast, slow = stacked(
        teaching,
        [{"chunk": 0, "rule": "rms"}, {"chunk": 2, "lr": 0.0, "consolidate": 0.5}],
        {"lr": 0.1, "decay": 0.01},
    )
    assert (fast.chunk_size, fast.lr, fast.decay, slow.chunk_size, slow.lr, slow.decay) == (
        16, 0.1, 0.01, 64, 0.0, 0.0,
    )  # fmt: skip
    grads = torch.tensor([3.0, -0.1])
    step = resolve_rule(fast.rule).step({}, {"w": grads}, 1.0)
    torch.testing.assert_close(step.directions["w"], torch.tensor([1.0, -1.0]))


# -- documents


def test_the_manifest():
    found = files.manifest()
    counted = {part: sum(each.part == part for each in found) for part in ("short", "long", "tuning")}
    assert counted == {"short": 16, "long": 4, "tuning": 4}
    paths = [path for each in found for path in each.paths]
    assert len(set(paths)) == len(paths)
    for each in found:
        if importlib.metadata.version(each.package) == each.version:
            assert each.problem() is None
            assert len(each.text()) > 8192


def test_a_changed_or_missing_file_is_named(monkeypatch, tmp_path):
    good = tmp_path / "good.md"
    good.write_text("words " * 400)
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)

    def document(path, sha, part):
        return files.UnreadDocument("", "", "docs", part, (path,), (sha,))

    made = (
        document("good.md", digest, "short"),
        document("absent.md", digest, "short"),
        document("good.md", "0" * 64, "short"),
        document("good.md", digest, "short"),
        document("good.md", digest, "long"),
        document("good.md", digest, "tuning"),
    )
    monkeypatch.setattr(files, "manifest", lambda: made)
    task = find_task("longdoc").at("smoke", documents="")
    assert task.missing() is None
    assert [each.paths for each in task.documents()[0]] == [("good.md",)] * 4
    assert "absent.md is missing" in task.note()
    assert "good.md has changed" in task.note()
    strict = find_task("longdoc").at("smoke", documents="", skip_absent=False)
    assert "absent.md is missing" in strict.missing()
    assert "absent.md" in find_task("longdoc").at("smoke", documents="", short=4).missing()
    figures = task.run(READERS[0].method, 1)
    assert figures["document"] == "good.md"
    with pytest.raises(ValueError, match="number of a document"):
        task.run(READERS[0].method, 3)


def test_a_folder_of_documents(tmp_path):
    for name in ("a.py", "b.md", "c.txt", "d.rst", "e.json"):
        (tmp_path / name).write_text(f"{name} is a document of some length. " * 30)
    task = find_task("longdoc").at("smoke", documents=str(tmp_path))
    names = [each.paths[0].rpartition("/")[2] for each in task.documents()[0]]
    assert names == ["b.md", "c.txt", "d.rst", "a.py"]  # the first tunes, the last is long
    assert task.run(READERS[0].method, 2)["long"] > 0
    assert task.tune(READERS[0].method, 1000)["bits per byte"] > 0
    assert (
        "expected 2 short, 2 long"
        in find_task("longdoc").at("smoke", documents=str(tmp_path), long=2).missing()
    )


def test_learned_starts_come_from_the_tuning_documents_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path))
    task = find_task("longdoc").at("smoke", documents="made-up")
    first = task.run(STARTED.method, 0)
    (path,) = (tmp_path / "starts").glob("*.safetensors")
    found = Starts.load(path)
    best = min(loss for _, loss in found.report["held_out"])
    assert best < found.report["held_out"][0][1]
    monkeypatch.setattr(learned_starts, "learn_starts", lambda *a, **k: pytest.fail("learned again"))
    assert task.run(STARTED.method, 0)["bits per byte"] == first["bits per byte"]
    plain = PretrainedMethod("plain", "stack", options={"levels": STARTED.method.options["levels"]})
    monkeypatch.setitem(longdoc.BY_NAME, "plain", DocumentReader(plain))
    assert first["bits per byte"] < task.run(plain, 0)["bits per byte"]  # texts of one kind
    with pytest.raises(pytest.fail.Exception, match="learned again"):
        find_task("longdoc").at("smoke", documents="made-up", tuning=2).run(STARTED.method, 0)
    short = find_task("longdoc").at("smoke", documents="made-up", tokens=130)
    with pytest.raises(ValueError, match=r"have 1 pieces of two windows \(128 tokens\)"):
        short.run(STARTED.method, 0)


def test_starts_that_two_want_at_once_are_learned_once(tmp_path, monkeypatch, model):
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path))
    learn, begun = learned_starts.learn_starts, []

    def slowly(*arguments, **options):
        begun.append(time.monotonic())
        time.sleep(0.3)
        return learn(*arguments, **options)

    monkeypatch.setattr(learned_starts, "learn_starts", slowly)
    practice = [torch.randint(64, (300,), generator=torch.Generator().manual_seed(0)).tolist()]
    levels = [Level(16, 0.1)]
    with ThreadPoolExecutor(2) as pool:
        wanted = [pool.submit(starts_for, model, levels, (64, 32), practice, steps=1, rank=2) for _ in "ab"]
        one, other = (each.result().report for each in wanted)
    assert len(begun) == 1
    assert one == other


@pytest.mark.parametrize(("budget", "strides"), [("smoke", (32, 128)), ("small", (512, 4096))])
def test_every_reader_is_registered_and_its_settings_fit(budget, strides):
    task = find_task("longdoc").at(budget)
    for each in READERS:
        assert find_method(each.method.name) == each.method
        json.dumps([*map(dict, task.grid(each.method)), each.method.describe()])
        positions, overlap = task.teaching(each).reading
        stride = strides[positions == task.options.windows[2]]
        assert positions - overlap == (stride if each.read_again is None else positions - positions // 4)
        if each.method.way == "stack":
            given = {**each.method.options, **task.grid(each.method)[0]}
            levels = stacked(task.teaching(each), given.pop("levels"), given)
            stack_levels(random_llama(8192), levels=levels, window=positions, overlap=overlap)


# -- facts


def test_facts_are_told_early_and_the_filler_is_not_told_twice():
    made, filler = make_facts(6, 3), made_up_filler()[0]
    text = told_early(made, 2, filler, (4000, 0.25), BYTES, 3)
    assert len(text) == 4000
    whole = BYTES.tokenizer.decode(text)
    assert all(whole[:1000].count(fact.sentence) == whole.count(fact.sentence) == 2 for fact in made)
    paragraphs = [line for line in whole.split("\n\n")[:-1] if line.startswith("Citizen")]
    assert len(set(paragraphs)) >= len(paragraphs) - 1  # but for one that is cut where the facts end
    crowded = BYTES.tokenizer.decode(told_early(made, 2, filler, (1200, 0.25), BYTES, 3))
    assert all(crowded.count(fact.sentence) == 2 for fact in made)


def test_a_level_that_replays_reads_as_a_learner_with_replay_does(base):
    """Half of what it learns is drawn from what it has read, by the seed of the run."""
    method = dataclasses.replace(find_method("level-replay"), settings={"lr": 1e-3})
    teaching = Teaching((32, 64, 128), 64, rule="adam", alone=False, clip=1.0, reading=(64, 32))
    ids = torch.randint(97, 123, (192,), generator=torch.Generator().manual_seed(0))
    expected = {}
    for seed in (1, 2):
        levels, replay = [Level(32, 1e-3, rule="adam")], Replay(share=0.5, choose="surprise", seed=seed)
        learner = stack_levels(base.model, levels=levels, window=64, overlap=32, replay=replay)
        learner.observe(ids)
        with method.open(base, teaching, seed) as student:
            student.learn(Reading((Passage(tuple(ids.tolist())),)))
            (ours,), (theirs,) = student.learner.memory.rows, learner.memory.rows
            assert ours.store.tokens == theirs.store.tokens > 0
            with student.active() as view, learner.active() as model:
                expected[seed] = model(ids[None, :20]).logits
                assert torch.equal(view.model(ids[None, :20]).logits, expected[seed])
    assert not torch.equal(expected[1], expected[2])


@needs_bm25
def test_passages_stand_before_the_question(base, model):
    """The passage with the words of the question is looked up, behind the context, and answers see both."""
    text = "".join(f"The lamp of room {n} hangs in corner {n * n}.\n" for n in range(40))
    reading = Reading((Passage(tuple(base.ids(text))),))
    student = PassageStudent(WindowStudent(model, 30, 16), base.tokenizer, 96, 1)
    student.learn(reading)
    question = torch.tensor(base.ids("The lamp of room 17 hangs in corner 2"))
    with student.active() as view:
        found = view.look_up(question[:-1].tolist())
        assert "room 17 hangs" in base.tokenizer.decode(found)
        [answered] = ask(view, [question], 1, [1])
        [again] = ask(View(model, torch.cat([view.context, found])), [question], 1)
        assert len(view.context) == 30
        nothing = view.look_up(base.ids("zzz qqq"))
        assert len(nothing) == 0
        with pytest.raises(ValueError, match="looked up for prompts"):
            ask(view, [question], 1)
    torch.testing.assert_close(answered.losses, again.losses, rtol=1e-4, atol=1e-5)


@needs_bm25
@pytest.mark.parametrize("in_order", [False, True])
def test_the_best_passage_or_the_one_read_last_stands_last(base, model, in_order):
    """The order of reading is that of `Learner.retrieve`."""
    text = "".join(f"The lamp of room {n} hangs in corner {n * n}.\n" for n in range(40))
    student = PassageStudent(WindowStudent(model, 30, 16), base.tokenizer, 96, 4, in_order=in_order)
    student.learn(Reading((Passage(tuple(base.ids(text))),)))
    with student.active() as view:
        found = base.tokenizer.decode(view.look_up(base.ids("5 25")))  # room 5 has both, room 25 one
    early, late = found.rindex("room 5 hangs"), found.rindex("room 25 hangs")
    assert (early < late) is in_order


def test_facts_tasks_need_no_data_at_smoke(base):
    task = find_task("facts-8k").at("smoke")
    figures = task.run(find_method("context-2k"), 0)
    assert len(figures["cloze of each fact often"]) == 3
    assert len(figures["paraphrased of each once"]) == 6
    plain = task.run(find_method("no-adaptation"), 0)
    assert plain["damage once"] == plain["damage often"] == 0.0
    assert plain["cloze log p once"] == plain["cloze log p often"]


def test_facts_told_often_alone(base):
    both = find_task("facts-32k").at("smoke")
    task = find_task("facts-32k").at("smoke", told_once=False)
    method = find_method("context-2k")
    figures = task.run(method, 0)
    assert not [name for name in figures if name.endswith("once")]
    whole = both.run(method, 0)
    assert figures["cloze of each fact often"] == whole["cloze of each fact often"]
    assert set(task.constants()["chance"]) == {"cloze often", "paraphrased often"}
    at_tuning = task.taught(method, 1, task.options.tuning_tokens)
    assert task.tune(method, 1)["cloze often"] == at_tuning["objective often"]
    assert "told 2 times" in task.note()
    assert "told once and 2 times" in both.note()


# -- month


def test_values_of_topics():
    for topic in TOPICS:
        values = topic.values.split()
        assert len(set(values)) == 12
        assert not any(a != b and b.startswith(a) for a in values for b in values), topic.told


@pytest.mark.parametrize("seed", range(4))
def test_a_month_tells_the_latest_value_last(seed):
    months = two_months(30, 13, seed)
    assert months == two_months(30, 13, seed) != two_months(30, 13, seed + 1)
    for month, other in zip(months, months[::-1], strict=True):
        assert len(month.conversations) == 30
        whole = "".join(month.conversations)
        assert len(month.asked) >= 10
        assert sum(each.before is not None for each in month.asked) == len(month.asked) // 3
        for each in month.asked:
            if each.before is None:
                assert each.topic.told.format(v=each.value) in whole
            else:
                first = whole.index(each.topic.told.format(v=each.before))
                assert first < whole.index(each.topic.corrected.format(v=each.value))
        # what the other one keeps private is not told here, and what both tell differs
        assert month.foreign == tuple(each for each in other.asked if each.topic.private)
        assert len(month.foreign) == 3
        own = {each.topic: each.value for each in month.asked}
        assert not any(each.topic in own for each in month.foreign)
        assert not any(own[each.topic] == each.value for each in other.asked if each.topic in own)
    with pytest.raises(ValueError, match="more conversations"):
        two_months(5, 13, seed)


def test_answers_and_leaks_by_hand(base, model):
    answer = ScoredValues(red=-1.0, blue=-3.0, green=-5.0)
    assert answer.likeliest == "red"
    assert answer.above_others("blue") == pytest.approx(0.0)
    month = two_months(30, 13, 0)[0]
    plain = View(model)
    [first, *_] = answers(plain, month.asked[:2], base)
    topic = month.asked[0].topic
    value = topic.values.split()[3]
    prompt = base.ids(month.asked[0].prompt)
    ids = torch.tensor(prompt + base.ids(f" {value}"))
    [asked] = ask(plain, [ids], 1)
    assert first[value] == pytest.approx(-float(asked.losses[len(prompt) - 1 :].sum()), rel=1e-4)
    found = scored(month, plain, answers(plain, month.foreign, base), base)
    assert found["leak"] == [0.0] * 3
    assert len(found["recall"]) == len(month.asked)
    assert len(found["correction"]) == len(month.asked) // 3


def test_each_user_has_a_learner_of_his_own():
    """One model for both hears both; a learner of one's own is the same, whoever else talks."""
    task = find_task("month").at("smoke")
    level = find_method("one-level").at({"lr": 0.01})
    figures = task.run(level, 0)
    assert figures["damage"] != 0.0
    assert figures["leak"] != 0.0  # of the base model as it was, not of what the level made of it
    assert figures == {**task.run(level, 0), "seconds": figures["seconds"]}
    shared = task.run(find_method("fine-tuning-shared").at({"lr": 0.01}), 0)
    alone = task.run(find_method("fine-tuning").at({"lr": 0.01}), 0)
    assert shared["log p"] != alone["log p"]
