"""The task `lm_eval`: a plain model's numbers are the harness' own, exactly; a learner scores first."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from nested_learning.continual import Level, stack_levels
from nested_learning.evals import find_method, find_task
from nested_learning.evals.tasks.harness import sources
from nested_learning.training.data import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval")
evaluator = pytest.importorskip("lm_eval.evaluator")
tasks_of_lm_eval = pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.slow

TEXT = "the cat saw a dog and then it went home to eat some more fish on a mat"
WORDS = TEXT.split()
DOCUMENTS = [
    {
        "context": " ".join(WORDS[n : n + 9] * 2),
        "continuation": WORDS[(3 * n) % 7],
        "other": "trees",
        "gold": n % 2,
    }
    for n in range(8)
]
CHOICE = """
output_type: multiple_choice
fewshot_split: test
doc_to_text: context
doc_to_choice: "{{[continuation, other]}}"
doc_to_target: gold
metric_list: [{metric: acc, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{(context + ' ' + continuation + '. ') * 8}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: context
doc_to_target: continuation
generation_kwargs: {until: ["<|endoftext|>"], max_gen_toks: 5, do_sample: true, temperature: 3.0}
metric_list: [{metric: exact_match}, {metric: bleu}]
"""
KINDS = {"tiny_choice": CHOICE, "tiny_rolling": ROLLING, "tiny_generate": GENERATE}
COLUMNS = ("seconds", "observed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, a file of each kind of task, and LAMBADA."""
    path = tmp_path_factory.mktemp("harness")
    model, tokenizer = sources.load_model("random", "auto")
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    data = path / sources.LAMBADA_FILE
    data.write_text(lines)
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
    for name, text in KINDS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return path


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(folder))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # takes seconds


def figures(folder, method="as-it-is", lr=None, names=tuple(KINDS), **options):
    tasks = [name if name == "lambada" else str(folder / f"{name}.yaml") for name in names]
    options = {"model": str(folder / "model"), "tasks": tasks, "limit": 0, **options}
    chosen = find_method(method).at({} if lr is None else {"lr": lr})
    return find_task("lm_eval").at("small", **options).run(chosen, 0)


def own(folder, names, **options):
    """What lm-eval itself says, by task and metric."""
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model")},
        tasks=[str(folder / f"{name}.yaml") for name in names],
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        task_manager=tasks_of_lm_eval.TaskManager(include_defaults=False),  # all take a minute to read
        **options,
    )
    return {
        f"{task} {key.removesuffix(',none')}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if "stderr" not in key and "," in key
    }


@pytest.mark.parametrize("fewshot", [None, 2])
def test_a_plain_models_numbers_are_the_harness_own(folder, fewshot):
    expected = own(folder, KINDS, num_fewshot=fewshot)
    found = figures(folder, fewshot=fewshot)
    assert len(expected) >= 4
    assert {name: found[name] for name in expected} == expected
    highs = [expected["tiny_choice acc"], expected["tiny_generate exact_match"]]
    assert found["accuracy"] == sum(highs) / 2
    assert found["observed"] == 0


def test_the_first_documents_are_the_limit_of_the_harness(folder):
    expected = own(folder, ["tiny_rolling"], limit=3)
    found = figures(folder, names=["tiny_rolling"], limit=3, lrs=[0.1])
    assert {name: found[name] for name in expected} == expected


def test_lambada_is_scored_as_the_harness_scores_it(folder):
    """The protocol of `lambada_openai`, over the same texts."""
    yaml = """task: tiny_lambada
output_type: loglikelihood
dataset_path: json
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
"""
    data = folder / "texts.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{d['context']} {d['continuation']}"}) + "\n" for d in DOCUMENTS)
    )
    (folder / "tiny_lambada.yaml").write_text(f"{yaml}dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n")
    expected = own(folder, ["tiny_lambada"])
    found = figures(folder, names=["lambada"])
    for metric in ("perplexity", "acc"):
        assert found[f"lambada {metric}"] == expected[f"tiny_lambada {metric}"]


def test_levels_that_learn_nothing_change_nothing(folder):
    names = [*KINDS, "lambada"]
    plain, still = figures(folder, names=names), figures(folder, "learning-two-levels", 0.0, names)
    assert {k: v for k, v in plain.items() if k not in COLUMNS} == {
        k: v for k, v in still.items() if k not in COLUMNS
    }
    assert still["observed"] > 0


def test_each_document_is_scored_before_it_is_learned(folder):
    """LAMBADA by hand: score with what was learned from earlier documents, then read the document."""
    model, _ = sources.load_model(str(folder / "model"), "auto")
    learner = stack_levels(model, levels=[Level(64, 0.5)])
    end, losses = byte_tokenizer().eos_token_id, []
    for document in DOCUMENTS:
        context, answer = document["context"].encode(), f" {document['continuation']}".encode()
        ids = torch.tensor([*context, *answer])
        with torch.no_grad():
            log_p = F.log_softmax(learner.logits(ids[None, :-1])[0], dim=-1)
        losses.append(-log_p[torch.arange(len(ids) - 1), ids[1:]][-len(answer) :].sum().item())
        learner.observe(torch.cat([torch.tensor([end]), ids]))
    expected = math.exp(sum(losses) / len(losses))
    found = figures(folder, "learning-one-level", 0.5, ["lambada"])
    plain = figures(folder, names=["lambada"])
    assert found["lambada perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["lambada perplexity"] < 0.9 * plain["lambada perplexity"]
    assert found["observed"] == sum(len(d["context"]) + len(d["continuation"]) + 2 for d in DOCUMENTS)
    first = [
        figures(folder, *how, names=["lambada"], limit=1, lrs=[0.5])
        for how in ((), ("learning-one-level", 0.5))
    ]
    assert first[0]["lambada perplexity"] == first[1]["lambada perplexity"]


def test_windows_of_a_long_text_are_learned_one_by_one(folder):
    """Text beyond the model's positions: the second window is read by what the first one taught."""
    names = ["tiny_rolling"]
    plain, learned = (
        figures(folder, names=names, limit=1, lrs=[0.5]),
        figures(folder, "learning-one-level", 0.5, names, limit=1, lrs=[0.5]),
    )
    text = f"{DOCUMENTS[0]['context']} {DOCUMENTS[0]['continuation']}. " * 8
    assert len(text) > 512
    assert learned["observed"] == len(text) + 1
    assert learned["tiny_rolling bits_per_byte"] < plain["tiny_rolling bits_per_byte"]


def test_what_the_requests_of_a_document_have_in_common():
    from nested_learning.evals.tasks.harness.reading import common_text

    assert common_text([("a b", " c")]) == "a b c"
    assert common_text([("a b", " c"), ("a b", " c")]) == "a b c"  # repeated
    assert common_text([("a b", " c"), ("a b", " d")]) == "a b"
    assert common_text([("", "c")]) == "c"
    assert common_text([("a b", " c"), ("a b", " d"), ("", " c"), ("", " d")]) == "a b"
    assert common_text([("Ann saw Bob as Ann", " ran"), ("Ann saw Bob as Anton", " ran")]) == "Ann saw Bob as"
    assert common_text([("x", " c"), ("y", " c")]) == ""
