"""The evidence for pretrained models: each part runs, goes on where it stopped, measures what it says."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.pretrained import __main__ as command
from benchmarks.pretrained import facts, language, methods, trials
from benchmarks.pretrained.asking import Answered, View, ask, continuations
from benchmarks.pretrained.chrf import chrf
from benchmarks.pretrained.invented import BREAK, RELATIONS, make_facts, stream
from benchmarks.pretrained.methods import InContext, Method, fine_tuned, lora
from benchmarks.pretrained.sentences import Cipher, Pair, kalamang, lessons
from nested_learning.training.data import byte_tokenizer

DATA = Path(os.environ.get("NESTED_LEARNING_DATA", "../shared/data"))
needs_peft = pytest.mark.skipif(not methods.HAS_PEFT, reason="needs peft")
HEADER = ["ID", "Primary_Text", "Translated_Text", "alt_translation1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model that `--model` takes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files with the names of the real ones."""
    path = tmp_path_factory.mktemp("data")
    speech = BREAK.join(f"Citizen {i}:\nSpeak, speak {i * i}." for i in range(400))
    (path / facts.FILLER).write_text(speech)
    (path / facts.OTHER).write_text(" = Lobster = \n " + "The lobster lives in the sea . " * 200)
    with (path / language.DATA).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        table.writerows([str(i), f"ma {i} toni", f"he sees the fish {i}.", ""] for i in range(40))
    return path


def line(part, folder, data, *more):
    given = [part, "--quick", "--model", str(folder), *more]
    if part != "speed":
        given += ["--data", str(data), "--seeds", "0", "1"]
        if not methods.HAS_PEFT:
            given += ["--methods", "no adaptation", "in context", "fine-tuning", "one level", "three levels"]
    return given + (["--reads", "2"] if part == "facts" else [])


# -- the parts


def check_rows(rows):
    names = {row["method"]: row for row in rows}
    assert len(names) == 5 + methods.HAS_PEFT
    base = names["no adaptation"]
    assert base["lr"] == ""
    assert names["three levels"]["lr"].endswith("*")
    for row in rows:
        assert set(row["trials"]) == {"0", "1"}
        values = [trial["cloze log p"] for trial in row["trials"].values()]
        assert row["cloze log p"] == pytest.approx(sum(values) / 2)
        if row is not base:
            assert row["other perplexity"] != base["other perplexity"]


@pytest.mark.parametrize("part", ["facts", "language", "speed"])
def test_quick_run(part, folder, data, tmp_path, monkeypatch):
    """Figures, plot and cache are written whole; a second run repeats the first from its cache alone."""
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("f", "json"), ("p", "png"), ("c", "json"))}
    given = line(part, folder, data, "--json", str(files["f"]), "--plot", str(files["p"]))
    given += ["--cache", str(files["c"])]
    figures = command.main(given)
    written = json.loads(files["f"].read_text())
    assert written == json.loads(json.dumps(figures))
    assert all(claim["because"] for claim in written["parts"][part]["claims"])
    assert files["p"].read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    if part == "facts":
        check_rows(figures["parts"]["facts"]["reads"]["2"])
    monkeypatch.setattr("benchmarks.pretrained.request.load", lambda *_: pytest.fail("loaded again"))
    assert command.main(given)["parts"] == figures["parts"]


def test_out_of_time_and_going_on(folder, data, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "c.json"), "--methods", "no adaptation", "one level"]
    given = line("facts", folder, data)  # of two --methods the second counts
    with pytest.raises(SystemExit) as stopped:
        command.main([*given, *cache, "--max_minutes", "1e-9"])
    assert stopped.value.code == 3
    assert "the same command goes on" in capsys.readouterr().out
    figures = command.main([*given, *cache])
    assert [row["method"] for row in figures["parts"]["facts"]["reads"]["2"]] == [
        "no adaptation",
        "one level",
    ]
    kept = json.loads((tmp_path / "c.json").read_text())["results"]
    assert len(kept) == 2 + 1 + 2  # two seeds each, and the tuning of one level


def test_bad_input(folder, data, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    base = line("facts", folder, data)
    for given, message in (
        ([*base, "--cache", str(other)], "is no cache of these benchmarks"),
        ([*base, "--max_minutes", "1"], "needs --cache"),
        ([*base, "--methods", "prayer"], "unknown methods: prayer"),
        ([*base, "--reads", "0"], "at least 1"),
        ([*base, "--seeds", str(trials.TUNING_SEED)], "is for tuning"),
        ([*base, "--data", str(tmp_path)], "name the folder of the data by --data"),
        ([*base, "--model", str(tmp_path)], "holds no model"),
        (["speed", "--seeds", "1"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(given)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


# -- facts


def test_the_text_tells_every_fact(data):
    made, tokenizer = make_facts(16, 3), byte_tokenizer()
    filler = (data / facts.FILLER).read_text()
    text = stream(made, 3, filler, 4000, tokenizer, 3)
    assert text.shape == (4000,)
    whole = tokenizer.decode(text)
    assert all(whole.count(fact.sentence) == 3 for fact in made)
    assert sum(len(fact.sentence + BREAK) for fact in made) * 3 < 3500  # the rest is filler
    assert not torch.equal(text, stream(made, 3, filler, 4000, tokenizer, 4))
    torch.testing.assert_close(text, stream(made, 3, filler, 4000, tokenizer, 3))
    for tokens, message in ((500, "fewer facts"), (10**5, "more filler")):
        with pytest.raises(ValueError, match=message):
            stream(made, 3, filler, tokens, tokenizer, 3)


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
    question = facts.Question(torch.arange(4), 2, False)
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


@pytest.mark.parametrize("name", ["fine-tuning", pytest.param("LoRA", marks=needs_peft), "three levels"])
def test_a_student_learns_and_leaves_the_model_alone(model, name):
    before = {key: p.clone() for key, p in model.state_dict().items()}
    text = torch.arange(97, 107).repeat(40)
    plan = methods.Plan((20, 40, 80), 64, dict.fromkeys(("fine-tuning", "LoRA", "one level", name), (0.01,)))
    plan.rates.setdefault("three levels", (0.01,))
    [method] = [each for each in methods.standard(plan) if each.name == name]
    [base] = ask(View(model), [text[:30]], 1)
    with method.open(model, 0.01) as student:
        student.learn(text)
        with student.active() as view:
            [learned] = ask(view, [text[:30]], 1)
    assert learned.losses.mean() < base.losses.mean() - 0.1
    assert not changed(model, before)
    [after] = ask(View(model), [text[:30]], 1)
    assert torch.equal(after.losses, base.losses)
    assert all(p.requires_grad for p in model.parameters())


@needs_peft
def test_lora_trains_its_factors_on_the_mlps_alone(model):
    with lora(model, 0.01, 8) as student:
        names = [name for name, p in student.model.named_parameters() if p.requires_grad]
        assert len(student.parameters) == len(names) == 2 * 3 * 2  # two factors, three maps, two layers
        assert all("lora_" in name and "mlp" in name for name in names)


def test_fine_tuning_keeps_steps_that_bfloat16_would_lose(model):
    """Small steps add up in the float32 copies although each is below the precision of the weights."""
    half = model.to(torch.bfloat16)
    with fine_tuned(half, 1e-6, 8) as student:
        start = [master.clone() for master in student.masters]
        student.learn(torch.arange(97, 113).repeat(4))
        moved = [(m - s).abs().max() for m, s in zip(student.masters, start, strict=True)]
        assert min(moved) > 3e-6
        assert max(moved) < 1e-5


def test_the_context_is_the_end_of_what_was_read(model):
    student = InContext(model, 8)
    student.learn(torch.arange(5))
    student.learn(torch.arange(5, 11))
    with student.active() as view:
        assert view.context.tolist() == list(range(3, 11))


@pytest.mark.parametrize(
    "name", ["fine-tuning", pytest.param("LoRA", marks=needs_peft), "one level", methods.AVERAGED]
)
def test_only_what_is_masked_in_is_learned(model, name):
    """With a mask other targets do not matter, and alone a chunk has but one token before it."""
    plan = methods.Plan((8, 16, 32), 64, {**dict.fromkeys(language.PLAN.rates, (0.01,))}, alone=True)
    [method] = [each for each in methods.standard(plan) if each.name == name]
    text, probe = torch.arange(97, 129).repeat(2), torch.arange(97, 120)
    mask = torch.zeros(64, dtype=torch.bool)
    mask[1::8] = True  # the second of every chunk
    found = []
    seen = mask | mask.roll(-1) | mask.roll(-2)
    for ids in (text, text.where(seen, 50), text.where(mask, 50)):
        with method.open(model, 0.01) as student:
            student.learn(ids, mask)
            with student.active() as view:
                found.append(ask(view, [probe], 1)[0].losses)
    [base] = ask(View(model), [probe], 1)
    assert not torch.allclose(found[0], base.losses)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_averaged_levels_are_asked_by_the_slowest(model):
    levels = methods.averaged_levels((8, 16, 32), 0.01)
    student = methods.Levels(model, levels, True, [2])
    text, [base] = torch.arange(97, 129), ask(View(model), [torch.arange(97, 120)], 1)
    for learned in (False, True):  # the slowest writes at its boundary, not before
        student.learn(text[:16])
        with student.active() as view:
            [now] = ask(view, [torch.arange(97, 120)], 1)
        assert torch.equal(now.losses, base.losses) is not learned


def test_one_level_and_three_share_the_fastest(model):
    found = {each.name: each for each in methods.standard(facts.PLAN)}
    three, one = (found[name].settings["levels"] for name in ("three levels", "one level"))
    assert one == three[:1]
    assert [level["chunk_size"] for level in three] == list(facts.PLAN.chunks)
    assert facts.Size().tokens > 8192
    assert facts.Size().tokens % facts.PLAN.chunks[-1] == 0  # every fact is learned by every level


# -- trials


def test_the_rate_is_found_on_the_tuning_seed():
    calls = []

    def run(method, rate, seed):
        calls.append((rate, seed))
        score = {0.1: 1.0, 0.2: None, 0.4: 3.0}[rate]
        return {"good": score, "seed": float(seed)}

    method = Method("m", {}, lambda model, rate: None, (0.1, 0.2, 0.4))
    [row] = trials.compare([method], [0, 2], run, "good")
    assert (row["rate"], row["lr"], row["seed"], row["± seed"]) == (0.4, "0.4*", 1.0, math.sqrt(2))
    assert calls == [
        (0.1, trials.TUNING_SEED),
        (0.2, trials.TUNING_SEED),
        (0.4, trials.TUNING_SEED),
        (0.4, 0),
        (0.4, 2),
    ]


def test_claims_follow_the_figures():
    rows = [{"method": "a", "x": 1.0, "± x": 0.0}, {"method": "b", "x": 2.0, "± x": 0.0}]
    assert trials.claim(rows, "", "x", "a", "b")[0]["holds"]
    assert not trials.claim(rows, "", "x", "b", "a")[0]["holds"]
    assert trials.claim(rows, "", "x", "a", "c") == []


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
        Pair("Kalamang", "Ma toni", "He gives me the fish."),
        Pair("Kalamang", "Mu bo", "They go to the sea."),
    ]
    with pytest.raises(ValueError, match="lacks the columns alt_translation1"):
        kalamang("Primary_Text,Translated_Text\n")


@pytest.mark.skipif(not (DATA / language.DATA).is_file(), reason=f"needs {language.DATA}")
def test_the_real_table_has_enough_pairs():
    pairs = kalamang((DATA / language.DATA).read_text(encoding="utf-8"))
    assert len(pairs) > 1000
    assert len({pair.english for pair in pairs}) == len(pairs)
    size = language.Size()
    lessons(pairs, size.train, size.test, 0)


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
    pairs = [Pair("Kalamang", f"s{i}", f"it is {i}") for i in range(30)]
    a, b = lessons(pairs, 10, 5, 0)
    sides = [pair.english for part in (a.train, a.test, b.train, b.test) for pair in part]
    assert len(set(sides)) == 30
    text = byte_tokenizer().decode(b.blocks(byte_tokenizer(), 64)[0])
    assert all(f"{pair.prompt} {pair.english}\n\n" in text for pair in b.train)
    assert not any(pair.english + "\n" in text for pair in (*b.test, *a.test))
    with pytest.raises(ValueError, match="need 32, there are 30"):
        lessons(pairs, 11, 5, 0)


def test_a_lesson_is_in_blocks_and_english_is_marked():
    tokenizer = byte_tokenizer()
    pairs = [Pair("Velsan", f"s{i}", f"it is {i}") for i in range(4)]
    ids, english = language.Lesson(pairs, []).blocks(tokenizer, 64)
    assert len(ids) == len(english) == 2 * 64  # two pairs of 30 bytes fit in a block
    for block, own in zip(ids.split(64), (pairs[:2], pairs[2:]), strict=True):
        written = "".join(f"{pair.prompt} {pair.english}\n\n" for pair in own)
        assert tokenizer.decode(block) == written + "\n" * (64 - len(written))
    assert tokenizer.decode(ids[english]) == " it is 0\n it is 1\n it is 2\n it is 3\n"


def test_translations_are_scored_to_the_line_break(model, monkeypatch):
    tokenizer = byte_tokenizer()
    lesson = language.Lesson([], [Pair("Velsan", "x", "it is so"), Pair("Velsan", "y", "no")])
    answers = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" it is so\nEnglish", " no")
    ]
    monkeypatch.setattr(language, "continuations", lambda *_: answers)
    assert language.score(View(model), lesson, language.QUICK, tokenizer) == pytest.approx(100)


def test_the_floor_is_one_sentence_for_all():
    train = [Pair("", "", "ab"), Pair("", "", "xy")]
    lesson = language.Lesson(train, [Pair("", "", "ab"), Pair("", "", "ab")])
    assert language.floors(lesson) == {"mean": pytest.approx(50), "best": pytest.approx(100)}
