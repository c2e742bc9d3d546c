"""What pretrained methods keep of what they read, how they are asked; the tasks `facts` and `languages`."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from nested_learning.evals import find_method, find_task
from nested_learning.evals.data_files import data_folder
from nested_learning.evals.methods.pretrained import Base, Passage, Reading, Teaching, new_base
from nested_learning.evals.methods.pretrained.asking import Answered, View, ask, continuations
from nested_learning.evals.methods.pretrained.base import random_llama
from nested_learning.evals.methods.pretrained.method import averaging_levels, learning_levels
from nested_learning.evals.methods.pretrained.students import LevelStudent, WindowStudent, by_itself
from nested_learning.evals.methods.pretrained.tuning import HAS_PEFT, Steps, TunedStudent, adapted, own_copy
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.runner import EvalConfig, plan
from nested_learning.evals.tasks.facts import task as facts
from nested_learning.evals.tasks.facts.invented import BREAK, RELATIONS, made_up_filler, make_facts, stream
from nested_learning.evals.tasks.languages import task as languages
from nested_learning.evals.tasks.languages.chrf import chrf
from nested_learning.evals.tasks.languages.sentences import (
    Cipher,
    LanguageLesson,
    SentencePair,
    kalamang,
    lessons,
)
from nested_learning.training.data import byte_tokenizer

needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
HEADER = ["ID", "Primary_Text", "Translated_Text", "alt_translation1"]
BYTES = Base(None, byte_tokenizer(), None)  # for what needs the tokenizer alone


@pytest.fixture
def model():
    return random_llama().eval()


def reading(ids):
    """Ids as one running text."""
    return Reading((Passage(tuple(ids.tolist())),))


# -- facts


def test_the_text_tells_every_fact():
    made, filler = make_facts(16, 3), made_up_filler()[0]
    text = stream(made, 3, filler, 4000, BYTES, 3)
    assert text.shape == (4000,)
    whole = BYTES.tokenizer.decode(text)
    assert all(whole.count(fact.sentence) == 3 for fact in made)
    assert sum(len(fact.sentence + BREAK) for fact in made) * 3 < 3500  # the rest is filler
    assert not torch.equal(text, stream(made, 3, filler, 4000, BYTES, 4))
    torch.testing.assert_close(text, stream(made, 3, filler, 4000, BYTES, 3))
    for tokens, message in ((500, "fewer facts"), (10**5, "more filler")):
        with pytest.raises(ValueError, match=message):
            stream(made, 3, filler, tokens, BYTES, 3)


def test_facts_differ_by_seed_and_have_names_of_their_own():
    made = make_facts(40, 0)
    assert made == make_facts(40, 0)
    assert not {fact.told for fact in made} & {fact.told for fact in make_facts(40, 1)}
    assert len({fact.told for fact in made}) == 40
    for fact, relation in zip(made, RELATIONS * 5, strict=True):
        assert fact.answer in relation.answers.split()
        assert len(fact.paraphrases) == 2
        assert len({fact.told, *fact.paraphrases}) == 3
        assert not any(fact.answer in each for each in (fact.told, *fact.paraphrases))


def test_recall_and_perplexity_by_hand():
    """Two tokens of answer: a hit needs both; the log-probability is their mean."""
    question = facts.FactQuestion(torch.arange(4), 2, False)
    losses = torch.tensor([9.0, 1.0, 3.0])
    for hits, expected in (([False, True, True], 1.0), ([True, True, False], 0.0)):
        assert facts._answer(question, Answered(losses, torch.tensor(hits))) == (expected, -2.0)


def test_greedy_writing_agrees_with_the_hits(model):
    """An answer is a hit exactly if it is what greedy decoding writes."""
    prompt = torch.arange(40, 50)
    [answer] = continuations(View(model), [prompt], 3, -1, 1)
    right = torch.cat([prompt, torch.tensor(answer)])
    wrong = right.clone()
    wrong[-2] += 1
    hits = [each.hits[-3:].tolist() for each in ask(View(model), [right, wrong], 2)]
    assert hits[0] == [True, True, True]
    assert hits[1][:2] == [True, False]


# -- asking


@pytest.mark.parametrize("context", [None, torch.arange(60, 100)])
def test_sequences_are_asked_apart(model, context):
    """Batched, padded and with a shared context: as each one alone after the context."""
    sequences = [torch.arange(n, 2 * n) for n in (5, 9, 2, 7)]
    found = ask(View(model, context), sequences, 3)
    for ids, answered in zip(sequences, found, strict=True):
        whole = ids if context is None else torch.cat([context, ids])
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0, -len(ids) : -1]
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        torch.testing.assert_close(answered.losses, expected, rtol=1e-4, atol=1e-5)
        assert answered.hits.tolist() == (logits.argmax(-1) == ids[1:]).tolist()


@pytest.mark.parametrize("context", [None, torch.arange(60, 100)])
def test_continuations_are_those_of_generate(model, context):
    prompts = [torch.arange(n, 3 * n) for n in (5, 9, 2)]
    found = continuations(View(model, context), prompts, 6, -1, 2)
    for ids, continued in zip(prompts, found, strict=True):
        whole = ids if context is None else torch.cat([context, ids])
        written = model.generate(whole[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert continued == written[0, len(whole) :].tolist()
    stop = found[0][2]
    assert continuations(View(model, context), prompts, 6, stop, 2)[0] == found[0][: found[0].index(stop)]


# -- methods


def changed(model, before):
    return [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]


@pytest.mark.parametrize("name", ["fine-tuning", pytest.param("lora", marks=needs_peft), "three-levels"])
def test_a_student_learns_and_leaves_the_model_alone(model, name):
    before = {key: p.clone() for key, p in model.state_dict().items()}
    text = torch.arange(97, 107).repeat(40)
    teaching = Teaching((20, 40, 80), 64, rule="adam", alone=False, clip=1.0)
    [base] = ask(View(model), [text[:30]], 1)
    method = find_method(name).at({"lr": 0.01})
    with method.open(new_base(model, byte_tokenizer()), teaching, 0) as student:
        student.learn(reading(text))
        with student.active() as view:
            [learned] = ask(view, [text[:30]], 1)
    assert learned.losses.mean() < base.losses.mean() - 0.1
    assert not changed(model, before)
    [after] = ask(View(model), [text[:30]], 1)
    assert torch.equal(after.losses, base.losses)
    assert all(p.requires_grad for p in model.parameters())


@needs_peft
def test_lora_trains_its_factors_on_the_mlps_alone(model):
    with adapted(model) as (with_adapters, trained):
        names = [name for name, p in with_adapters.named_parameters() if p.requires_grad]
        assert len(trained) == len(names) == 2 * 3 * 2  # two factors, three maps, two layers
        assert all("lora_" in name and "mlp" in name for name in names)


def test_lora_without_peft(model, monkeypatch):
    monkeypatch.setattr("nested_learning.evals.methods.pretrained.tuning.HAS_PEFT", False)
    monkeypatch.setattr("nested_learning.evals.methods.pretrained.method.HAS_PEFT", False)
    with pytest.raises(ValueError, match="pip install peft"), adapted(model):
        pass
    task = find_task("facts").at("smoke")
    assert "lora" not in [method.name for method in task.methods()]
    assert "needs peft" in task.accepts(find_method("lora"))
    with pytest.raises(ValueError, match="needs peft"):
        plan(EvalConfig(tasks=["facts"], budget="smoke", methods=["lora"]))
    for methods in (None, ["lora"]):  # a report of finished runs needs no package
        (planned,) = plan(EvalConfig(tasks=["facts"], budget="smoke", methods=methods, only_report=True))
        assert "lora" in planned.entrants
    assert "needs peft" in task.note()


def test_fine_tuning_keeps_steps_that_bfloat16_would_lose(model):
    """Small steps add up in the float32 copies although each is below the precision of the weights."""
    student = TunedStudent(*own_copy(model.to(torch.bfloat16), "all"), Steps(1e-6, 8, clip=1.0))
    start = [master.clone() for master in student.masters]
    student.learn(reading(torch.arange(97, 113).repeat(4)))
    moved = [(m - s).abs().max() for m, s in zip(student.masters, start, strict=True)]
    assert min(moved) > 3e-6
    assert max(moved) < 1e-5


def test_the_context_is_the_end_of_what_was_read(model):
    student = WindowStudent(model, 8, 4)
    student.learn(reading(torch.arange(5)))
    student.learn(reading(torch.arange(5, 11)))
    with student.active() as view:
        assert view.context.tolist() == list(range(3, 11))


@pytest.mark.parametrize(
    "name", ["fine-tuning", pytest.param("lora", marks=needs_peft), "one-level", "three-levels-averaged"]
)
def test_only_what_is_masked_in_is_learned(model, name):
    """With a mask other targets do not matter, and alone a chunk has but one token before it."""
    teaching = Teaching((8, 16, 32), 64, rule="adam", clip=1.0)
    more = {"consolidate": [0.2, 0.4]} if "averaged" in name else {}
    method = find_method(name).at({"lr": 0.01, **more})
    text, probe = torch.arange(97, 129).repeat(2), torch.arange(97, 120)
    base = new_base(model, byte_tokenizer())
    found = []
    # pieces of eight, of which the second id is learned: it sees the first, and the last of the piece before
    for tail, head in ((None, None), (50, None), (None, 50)):
        pieces = []
        for piece in text.split(8):
            ids = piece.clone()
            if tail is not None:
                ids[2:7] = tail
            if head is not None:
                ids[0] = head
            pieces.append(Passage(tuple(ids.tolist()), (1, 2)))
        with method.open(base, teaching, 0) as student:
            student.learn(Reading(tuple(pieces), (0,)))
            with student.active() as view:
                found.append(ask(view, [probe], 1)[0].losses)
    [plain] = ask(View(model), [probe], 1)
    assert not torch.allclose(found[0], plain.losses)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_averaged_levels_are_asked_by_the_slowest(model):
    levels = averaging_levels(Teaching((8, 16, 32), 64, rule="adam"), 0.01, [0.2, 0.4])
    student = LevelStudent(model, levels, by_itself(8), [2])
    text, [base] = torch.arange(97, 129), ask(View(model), [torch.arange(97, 120)], 1)
    for learned in (False, True):  # the slowest writes at its boundary, not before
        student.learn(reading(text[:16]))
        with student.active() as view:
            [now] = ask(view, [torch.arange(97, 120)], 1)
        assert torch.equal(now.losses, base.losses) is not learned


def test_one_level_and_three_share_the_fastest():
    teaching = find_task("facts").at("small").teaching()
    one, three = (learning_levels(teaching, count, 1.0) for count in (1, 3))
    assert one == three[:1]
    assert [level.chunk_size for level in three] == list(teaching.chunks)
    assert [level.lr for level in learning_levels(teaching, 3, 1.0, 0.5)] == [1.0, 0.5, 0.25]
    options = find_task("facts").budgets["small"]
    assert options.tokens > 8192
    assert options.tokens % options.chunks[-1] == 0  # every fact is learned by every level


def test_bad_settings_say_what_came(model):
    base, teaching = new_base(model, byte_tokenizer()), Teaching((8, 16, 32), 64)
    for method, message in (
        (find_method("fine-tuning"), "settings of 'fine-tuning' are {}"),
        (find_method("three-levels").at({"lr": 0.1, "rank": 2}), "settings of 'three-levels' are"),
    ):
        with pytest.raises(ValueError, match=message):
            method.open(base, teaching, 0)


# -- the tasks


@pytest.mark.parametrize(("name", "method"), [("facts", "one-level"), ("languages", "retrieval")])
def test_one_trial_of_a_task(name, method):
    task = find_task(name).at("smoke")
    assert task.missing() is None
    chosen = find_method(method).at(task.grid(find_method(method))[0])
    figures, again = task.run(chosen, 0), task.run(chosen, 0)
    timed = [key for key in figures if "seconds" in key]
    assert {**figures, **dict.fromkeys(timed)} == {**again, **dict.fromkeys(timed)}
    assert set(task.columns) <= set(figures)
    json.dumps(figures, allow_nan=False)


def test_rates_are_tuned_for_the_objective_in_the_headlines_place(monkeypatch):
    figures = {"cloze": 0.1, "objective": -3.0}
    monkeypatch.setattr(facts.FactsTask, "run", lambda self, method, seed: figures)
    task = find_task("facts").at("small")
    assert task.tune(find_method("one-level"), 1000) == {task.headline: -3.0}
    scores = {languages.FIRST: 3.0, languages.KEPT: 1.0, languages.SECOND: 2.0}
    monkeypatch.setattr(languages.LanguagesTask, "run", lambda self, method, seed: scores)
    task = find_task("languages").at("small")
    assert task.tune(find_method("one-level"), 1000) == {task.headline: 2.0}
    assert [each["lr"] for each in task.grid(find_method("one-level"))] == [5e-5, 1e-4, 2e-4]


def test_claims_on_damage_count_the_lower_perplexity():
    task = find_task("facts").at("small")
    [claim] = [each for each in task.claims() if each.text == "three levels damage less than fine-tuning"]
    values = {"three-levels": 25.0, "fine-tuning": 32.0}
    rows = {
        name: MethodRow(name, {}, {seed: {"other perplexity": value + seed} for seed in range(3)})
        for name, value in values.items()
    }
    assert claim.judge(rows).verdict == "holds"


def test_what_a_task_lacks_is_said(tmp_path):
    for name, file in (("facts", facts.FILLER), ("languages", languages.DATA)):
        problem = find_task(name).at("small", model="random", data=str(tmp_path)).missing()
        assert file in problem
        assert "NESTED_LEARNING_DATA" in problem
        assert find_task(name).at("smoke").missing() is None
    assert "needs labels" in find_task("languages").at("smoke").accepts(find_method("replay"))
    assert "needs examples" in find_task("facts").at("smoke").accepts(find_method("retrieval"))


def test_a_look_up_takes_a_prompt(model):
    looked = View(model, look_up=lambda prompt: torch.tensor([prompt[0], 7]))
    prompts = [torch.arange(n, 2 * n) for n in (5, 9)]
    found = continuations(looked, prompts, 4, -1, 2)
    for prompt, written in zip(prompts, found, strict=True):
        context = View(model, torch.tensor([int(prompt[0]), 7]))
        assert continuations(context, [prompt], 4, -1, 1) == [written]
    with pytest.raises(ValueError, match="looked up for prompts"):
        ask(looked, prompts, 1)


# -- languages


def test_chrf_by_hand():
    assert chrf(["the cat sat"], ["the cat sat"]) == pytest.approx(100)
    assert chrf(["xyz"], ["abc"]) == 0
    # "ab" for "abc": 1-grams 2/2 and 2/3, 2-grams 1/1 and 1/2; trigrams only in the reference: left out
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf(["ab"], ["abc"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    # white space does not count; an n-gram counts as often as it is on both sides
    assert chrf(["a b"], ["ab"]) == pytest.approx(100)
    assert chrf(["aa"], ["a"]) == pytest.approx(100 * 5 * 0.5 / (4 * 0.5 + 1))
    # of the corpus together: 1-grams 1 of 2 on both sides
    assert chrf(["a", "b"], ["a", "c"]) == pytest.approx(50)
    with pytest.raises(ValueError, match="2 translations for 1"):
        chrf(["a", "b"], ["a"])


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="needs sacrebleu")
def test_chrf_is_sacrebleus():
    from sacrebleu.metrics.chrf import CHRF

    ours, theirs = ["the cat sat on a mat.", "a", ""], ["a cat sits on the mat!", "a dog", "no"]
    assert chrf(ours, theirs) == pytest.approx(CHRF().corpus_score(ours, [theirs]).score)


def test_the_english_column_is_found():
    rows = [
        "1,Ma toni,Dia kasih saya itu ikan.,He gives me the fish.",
        "2,Mu bo,They go to the sea.,Dorang pi di laut itu.",
        "3,Ka,Ikan saja besar,Ikan",
        "4,,He has no sentence here.,",
    ]
    found = kalamang("\n".join([",".join(HEADER), *rows]))
    assert found == [
        SentencePair("Kalamang", "Ma toni", "He gives me the fish."),
        SentencePair("Kalamang", "Mu bo", "They go to the sea."),
    ]
    with pytest.raises(ValueError, match="lacks the columns alt_translation1"):
        kalamang("Primary_Text,Translated_Text\n")


def test_the_real_table_has_enough_pairs():
    file = data_folder("") / languages.DATA
    if not file.is_file():
        pytest.skip(f"needs {languages.DATA}")
    pairs = kalamang(file.read_text(encoding="utf-8"))
    assert len(pairs) > 1000
    assert len({pair.english for pair in pairs}) == len(pairs)
    options = find_task("languages").budgets["small"]
    lessons(pairs, options.train, options.test, 0)


def test_the_made_up_language():
    cipher = Cipher(0)
    first = cipher("The dog sees the cat.")
    words = first.lower().rstrip(".").split()
    assert len(words) == 5
    assert words[1] == words[4]  # "the", back to front
    assert len(set(words)) == 4
    assert cipher("Cat?").lower() == words[0] + "?"
    assert Cipher(0)("The dog sees the cat.") == first
    assert Cipher(1)("The dog sees the cat.") != first


def test_lessons_do_not_overlap():
    pairs = [SentencePair("Kalamang", f"s{i}", f"it is {i}") for i in range(30)]
    a, b = lessons(pairs, 10, 5, 0)
    sides = [pair.english for part in (a.train, a.test, b.train, b.test) for pair in part]
    assert len(set(sides)) == 30
    text = byte_tokenizer().decode(torch.cat([ids for ids, _ in b.reading(BYTES).blocks(64)]))
    assert all(f"{pair.prompt} {pair.english}\n\n" in text for pair in b.train)
    assert not any(pair.english + "\n" in text for pair in (*b.test, *a.test))
    with pytest.raises(ValueError, match="need 32, there are 30"):
        lessons(pairs, 11, 5, 0)


def test_a_lesson_is_in_blocks_and_english_is_marked():
    tokenizer = byte_tokenizer()
    pairs = [SentencePair("Velsan", f"s{i}", f"it is {i}") for i in range(4)]
    blocks = LanguageLesson(pairs, []).reading(BYTES).blocks(64)
    ids, english = (torch.cat(part) for part in zip(*blocks, strict=True))
    assert len(ids) == len(english) == 2 * 64  # two pairs of 30 bytes fit in a block
    for block, own in zip(ids.split(64), (pairs[:2], pairs[2:]), strict=True):
        written = "".join(f"{pair.prompt} {pair.english}\n\n" for pair in own)
        assert tokenizer.decode(block) == written + "\n" * (64 - len(written))
    assert tokenizer.decode(ids[english]) == " it is 0\n it is 1\n it is 2\n it is 3\n"


def test_translations_are_scored_to_the_line_break(model, monkeypatch):
    tokenizer = byte_tokenizer()
    lesson = LanguageLesson([], [SentencePair("Velsan", "x", "it is so"), SentencePair("Velsan", "y", "no")])
    answers = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" it is so\nEnglish", " no")
    ]
    monkeypatch.setattr(languages, "continuations", lambda *_: answers)
    options = find_task("languages").budgets["smoke"]
    assert languages.score(View(model), lesson, options, BYTES) == pytest.approx(100)


def test_the_floor_is_one_sentence_for_all():
    train = [SentencePair("", "", "ab"), SentencePair("", "", "xy")]
    lesson = LanguageLesson(train, [SentencePair("", "", "ab"), SentencePair("", "", "ab")])
    assert languages.floors(lesson) == {"mean": pytest.approx(50), "best": pytest.approx(100)}
